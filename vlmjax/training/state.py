"""What a training run carries from step to step, and where each array of it lives on the mesh."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlmjax.errors import RecipeError
from vlmjax.sharding.mesh import batch_sharding, replicated
from vlmjax.sharding.rules import path_of, shardings

Tree = Any


class TrainState(flax.struct.PyTreeNode):
    """Everything an update reads and writes. Randomness is not here: it is a function of (seed, step).

    `params` holds the trainable parameters alone and `frozen` the others; frozen ones get no gradient and no
    optimizer state. `ema` is the moving average of `params`, or an empty dict. `extra` is what a stage carries beside
    them, such as a momentum encoder and a queue; what lies under its key `rows` has a row for each example.
    """

    step: Any  # int32 [], updates done; like the others also its shape or sharding
    params: Tree
    frozen: Tree
    opt_state: Tree
    ema: Tree
    extra: Tree


def split(params: Tree, frozen: Sequence[str]) -> tuple[Tree, Tree]:
    """Divide parameters into (trainable, frozen) by regexes on their "a/b/c" paths.

    Raises:
      RecipeError: where a regex matches nothing, or nothing is left to train.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    for pattern in frozen:
        if not any(re.fullmatch(pattern, path) for path in flat):
            groups = ", ".join(sorted({path.split("/")[0] for path in flat}))
            raise RecipeError(f"config.frozen: {pattern!r} matches no parameter (they begin with {groups})")
    is_frozen = {path: any(re.fullmatch(pattern, path) for pattern in frozen) for path in flat}
    if all(is_frozen.values()):
        raise RecipeError(f"config.frozen={tuple(frozen)} leaves no parameter to train")
    halves = ({p: v for p, v in flat.items() if is_frozen[p] is half} for half in (False, True))
    trainable, fixed = (traverse_util.unflatten_dict(half, sep="/") for half in halves)
    return trainable, fixed


def merge(params: Tree, frozen: Tree) -> Tree:
    """The whole parameter tree from its two halves."""
    flat = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(frozen)
    return traverse_util.unflatten_dict(flat)


def make_state(
    params: Tree,
    frozen: Sequence[str],
    optimizer: optax.GradientTransformation,
    ema: bool,
    extra: Callable[[Tree], Tree] = lambda trainable: {},
    frozen_dtype: Any = jnp.float32,
) -> TrainState:
    """A state at step 0. Traceable, so that it can be built directly in its final place."""
    trainable, fixed = split(params, frozen)
    fixed = jax.tree.map(lambda x: x.astype(frozen_dtype), fixed)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=trainable,
        frozen=fixed,
        opt_state=optimizer.init(trainable),
        ema=jax.tree.map(jnp.copy, trainable) if ema else {},
        extra=extra(trainable),
    )


def state_shardings(abstract: TrainState, rules: Sequence, mesh: Mesh) -> TrainState:
    """The sharding of every array of a state: parameters by rule, optimizer moments like their parameter.

    An array of the optimizer, or of a momentum encoder, belongs to the parameter whose path ends its own; it has the
    parameter's shape, or lacks one dimension of it (a factored moment). Counters are replicated. Rows of `extra` lie
    where those of a batch lie.
    """
    whole = shardings(rules, merge(abstract.params, abstract.frozen), mesh)
    by_path = traverse_util.flatten_dict(whole, sep="/")
    shapes = traverse_util.flatten_dict(merge(abstract.params, abstract.frozen), sep="/")

    def place(keypath: Any, leaf: Any) -> NamedSharding:
        parts = path_of(keypath).split("/")
        if parts[:2] == ["extra", "rows"]:
            return batch_sharding(mesh)
        for start in range(len(parts)):
            path = "/".join(parts[start:])
            if path in by_path and shapes[path].shape == leaf.shape:
                return by_path[path]
            if path in by_path:
                return _factored(by_path[path], shapes[path].shape, leaf.shape, rows="v_row" in parts[:start])
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, abstract)


def _factored(whole: NamedSharding, shape: tuple, left: tuple, rows: bool) -> NamedSharding:
    """The place of a moment that was averaged over one dimension of its parameter.

    Of two equal dimensions optax averages `v_row` over the last and `v_col` over the first.
    """
    gone = [i for i in range(len(shape)) if shape[:i] + shape[i + 1 :] == left]
    if not gone:
        return replicated(whole.mesh)  # what optax keeps in place of a moment it does not factor
    spec = (*whole.spec, *[None] * (len(shape) - len(whole.spec)))
    gone = gone[-1] if rows else gone[0]
    return NamedSharding(whole.mesh, PartitionSpec(*spec[:gone], *spec[gone + 1 :]))


def count(tree: Tree) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
