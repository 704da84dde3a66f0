"""Where activations live: models name the dimensions of their arrays, and here the names become mesh axes."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from vlmjax.sharding.mesh import BATCH_AXES

# The name of a dimension -> the mesh axes it is cut along. Unnamed dimensions are whole on every device.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "heads": ("tensor",),
    "mlp": ("tensor",),  # the wide half of an MLP
    "vocab": ("tensor",),  # scores of all tokens of a vocabulary
}


def constrain(x: Any, *names: str | None) -> Any:
    """`x`, held to its place on the mesh in context; its gradient is held to the same place.

    Without this the compiler may as well spread the width of activations over the axes that parameters are cut
    along, and then every device holds every example. Without a mesh nothing happens.

    Args:
      x: an array.
      names: for each dimension a name in ACTIVATIONS, or None. A dimension that its axes do not divide (the one
        example that parameters are made with) stays whole, and so does one whose axes the mesh lacks.
    """
    free = _free_axes()
    if not free:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(x.shape, names, free))


def on_each_device(function: Callable, names: Sequence[Sequence[str | None]], *arrays: Any) -> Any:
    """`function` of each device's own parts of the arrays, for kernels that the compiler cannot distribute.

    Args:
      function: no two parts may need each other; its result is cut as the first array is.
      names: for each array the names of its dimensions, as `constrain` takes them.
    """
    free = _free_axes()
    if not free:
        return function(*arrays)
    specs = tuple(_spec(x.shape, dims, free) for x, dims in zip(arrays, names, strict=True))
    # Kernels do not say over which axes their results vary.
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def _spec(shape: Sequence[int], names: Sequence[str | None], free: dict[str, int]) -> PartitionSpec:
    spec = []
    for size, name in zip(shape, names, strict=True):
        axes = tuple(axis for axis in ACTIVATIONS[name] if axis in free) if name else ()
        spec.append(axes if size % math.prod(free[axis] for axis in axes) == 0 else None)
    return PartitionSpec(*spec)


def parts(name: str) -> int:
    """How many parts a dimension of this name is cut into by the mesh in context; 1 without one."""
    free = _free_axes()
    return math.prod(free[axis] for axis in ACTIVATIONS[name] if axis in free)


def _free_axes() -> dict[str, int]:
    """Axes of the mesh in context that the compiler distributes over, and their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return {}
    return {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto  # inside a shard_map the arrays are parts already
    }


def on_mesh(mesh: Mesh) -> Callable[[Callable], Callable]:
    """Decorator of a function that is going to be compiled for `mesh`: `constrain` is heard inside.

    It does what `jax.set_mesh` around every call and every `lower` would do, and cannot be forgotten by a caller.
    (`with mesh:`, as older code has it, is not seen by `constrain`, nor by flax's constraints.)
    """

    def decorate(function: Callable) -> Callable:
        if mesh.size == 1:
            return function  # a mesh in context alone already changes the program that is lowered

        @functools.wraps(function)
        def inside(*args, **kwargs):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*args, **kwargs)

        return inside

    return decorate
