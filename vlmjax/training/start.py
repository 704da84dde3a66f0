"""How a run begins: the first or the continued state, and what is told about it."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from vlmjax.data import images
from vlmjax.sharding.rules import format_table, shardings
from vlmjax.training.build import import_params, imported
from vlmjax.training.checkpoint import Checkpoints
from vlmjax.training.compile import Program, init_params
from vlmjax.training.digests import by_path
from vlmjax.training.durations import Durations
from vlmjax.training.records import Reference
from vlmjax.training.state import TrainState, count, merge

Tree = Any


def start_state(
    recipe: Any, model: Any, program: Program, mesh: Mesh, checkpoints: Checkpoints
) -> tuple[TrainState, dict[str, Any]]:
    """The state a run goes on from: its newest good checkpoint, imported parameters, or random ones.

    Nothing is ever whole on one device: random numbers are drawn by a program compiled with its output shardings,
    imported and restored arrays are read slice by slice. Where there is a checkpoint nothing is imported but the frozen
    parameters that it only names.

    Returns:
      (state, data position of the checkpoint or {}).
    """
    continued = checkpoints.restore_newest(program.state)
    if continued:
        return continued
    places = jax.tree.map(lambda x: x.sharding, program.state)
    if not imported(recipe):
        return jax.jit(lambda: program.make(init_params(model, recipe.seed)), out_shardings=places)(), {}
    params = _imported(recipe, model, mesh)
    return jax.jit(program.make, out_shardings=places)(params), {}


def _imported(recipe: Any, model: Any, mesh: Mesh, only: Callable[[str], bool] | None = None) -> Tree:
    def fresh() -> Tree:
        return init_params(model, recipe.seed)

    places = shardings(recipe.sharding, jax.eval_shape(fresh), mesh)
    return import_params(recipe, model, places, fresh, only)


def reference(recipe: Any, model: Any, program: Program, mesh: Mesh) -> Reference | None:
    """Where the frozen parameters of a run are from, when they are imported ones; None where there are none."""
    sources, frozen = imported(recipe), set(program.state.frozen)
    if not frozen or not frozen <= set(sources):
        return None

    def fetch() -> Tree:
        wanted = program.state.frozen
        found = _imported(recipe, model, mesh, by_path(wanted).__contains__)
        return jax.tree.map(
            lambda x, like: jax.device_put(x.astype(like.dtype), like.sharding), found, wanted
        )

    return Reference(", ".join(sorted({sources[group] for group in frozen})), fetch)


def announce(
    recipe: Any, state: TrainState, stage: Any, mesh: Mesh, lengths: Durations, start: int, sources: str
) -> None:
    """Print what is about to run: devices, data, parameters and where each of them lives."""
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    devices = (
        f"{jax.device_count()} {jax.devices()[0].device_kind} device(s) in {jax.process_count()} process(es)"
    )
    print(f"devices     {devices}; mesh {axes}")
    print(f"data        {sources}; batch {recipe.batch_size}")
    backend = ", ".join(f"{what} by {name}" for what, name in images.backend().items() if what != "pillow")
    print(f"pictures    {backend}")
    print(f"loss        {stage.describe()}")
    trainable, frozen = count(state.params), count(state.frozen)
    print(f"parameters  {trainable + frozen:,} ({trainable:,} trained, {frozen:,} frozen)")
    over = start >= lengths.total
    print(
        f"steps       {start} to {lengths.total}"
        + (" (done before)" if over else " (continued)" if start else "")
    )
    params = merge(state.params, state.frozen)
    print(format_table(stage.placement(recipe.sharding, params), params, mesh))
    if not over:
        print("the first step compiles the program, which takes a while", flush=True)
