"""Frozen parameters that a checkpoint names and does not hold, for commands that read it: fetched from their source."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from vlmjax.errors import CheckpointError
from vlmjax.sharding.mesh import make_mesh, replicated
from vlmjax.training.build import import_params
from vlmjax.training.compile import init_params
from vlmjax.training.digests import by_path, host_digest
from vlmjax.training.reading import and_more
from vlmjax.training.records import FROZEN, named_only

Tree = Any


def whole(groups: Mapping[str, Tree], record: Mapping[str, Any], recipe: Any, model: Any) -> dict[str, Tree]:
    """The groups of a checkpoint with their `frozen` parameters, wherever these are kept; as numpy arrays.

    Args:
      groups: `params`, `frozen` and `ema` from `Checkpoints.read_params`.
      record: from there as well.
      recipe: of the run.
      model: of the run.

    Raises:
      CheckpointError: the source does not hold them any more.
      UserError: it cannot be read.
    """
    if not (names := named_only(record)):
        return dict(groups)
    mesh = make_mesh(devices=jax.local_devices(backend="cpu")[:1])
    shapes = jax.eval_shape(lambda: init_params(model, recipe.seed))
    places = jax.tree.map(lambda _: replicated(mesh), shapes)
    paths = {name.removeprefix(FROZEN) for name in names}
    found = import_params(recipe, model, places, lambda: init_params(model, recipe.seed), paths.__contains__)
    params, flat, wrong = by_path(found), {}, []
    for path in sorted(paths):
        dtype, _, digest = record["arrays"][FROZEN + path]
        value = params.get(path)
        flat[path] = None if value is None else np.asarray(value).astype(np.dtype(dtype))
        if value is None or host_digest(flat[path]) != digest:
            wrong.append(path)
    if wrong:
        raise CheckpointError(
            f"{record['frozen_from']} does not hold the frozen parameters any more that the run was trained beside: "
            f"{and_more(wrong)}; bring back what was there"
        )
    return {**groups, "frozen": traverse_util.unflatten_dict(flat, sep="/")}
