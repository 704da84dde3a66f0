"""How a contrastive loss is computed for a batch on a mesh: gathered at once, round a ring, or both."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from vlmjax.config_checks import LOSS_FORMS
from vlmjax.errors import RecipeError
from vlmjax.losses import tpu_kernel
from vlmjax.losses.tiles import Terms
from vlmjax.losses.travel import Route, make_route
from vlmjax.sharding.mesh import AXES, BATCH_AXES, batch_shards

# A ring waits for a link as often as it has devices. To be spared that, a gathered block and the gradient it collects
# may take so much memory for each of them; beyond, blocks travel.
GATHER_BYTES = 1 << 20
# Rows of a tile, so that its fp32 scores stay in the fast memory of a TPU core (128 MiB), a GPU (50 MB), a CPU (1 MB).
TILES = {"tpu": 2048, "gpu": 2048, "cpu": 512}
# Platforms with a kernel of their own, and its name; elsewhere XLA computes the tiles.
KERNELS = {"tpu": "pallas"}
SMALL_CORES = ("TPU v2", "TPU v3", "TPU v4")  # 16 MiB of fast memory, an eighth of what the kernels take

PLAIN = Terms()


class Choice(NamedTuple):
    """The form of a loss, and what it takes on each device beside the features and their gradients."""

    form: str
    route: Route
    tile: int
    kernel: str  # what computes a tile: xla | pallas
    predicted_bytes: int

    def describe(self) -> str:
        """One line for the start of a run."""
        where = f"over {'+'.join(self.route.axes)}" if self.route.axes else "on one device"
        tiles = f"tiles of {self.tile} ({self.kernel})"
        return f"{self.form} {where}, {tiles}, about {_size(self.predicted_bytes)} a device"


def choose(
    form: str,
    batch: int,
    width: int,
    mesh: Mesh | None,
    *,
    dtype: Any = jnp.float32,
    terms: Terms | None = PLAIN,
    slots: int | None = None,
) -> Choice:
    """The form of a loss over a global batch.

    Args:
      form: one of LOSS_FORMS. "auto" gathers while that takes little memory and goes round a ring beyond.
      batch: rows of the global batch.
      width: of the features.
      mesh: None for one device.
      dtype: of the features.
      terms: the sums that a softmax asks for; None for the sigmoid.
      slots: with a momentum encoder, how many earlier examples its queue holds for each row.

    Raises:
      RecipeError: an unknown form, or a hierarchy on a mesh with one axis.
    """
    if form not in LOSS_FORMS:
        raise RecipeError(f"loss.form = {form!r}: expected one of {', '.join(LOSS_FORMS)}")
    feature_bytes = jnp.dtype(dtype).itemsize
    if mesh is None:
        size = _tile_bytes(TILES["cpu"], batch, batch, width, feature_bytes)
        return Choice("one block", Route(), TILES["cpu"], "xla", size)
    axes = AXES if batch % mesh.size == 0 else BATCH_AXES
    devices = math.prod(mesh.shape[axis] for axis in axes)
    tile = TILES.get(mesh.devices.flat[0].platform, TILES["gpu"])
    # Keys that a queue adds are looked at alone: they and the batch's collect no gradient.
    keys, collected = batch * (1 + (slots or 0)), 0 if slots is not None else 4
    if form == "auto":
        small = keys * width * (feature_bytes + collected) <= devices * GATHER_BYTES
        form = "gather" if small else "ring"
    if form == "hierarchical" and min(mesh.shape["data"], batch_shards(mesh) // mesh.shape["data"]) < 2:
        raise RecipeError(
            f"loss.form = 'hierarchical' gathers along fsdp and goes round a ring along data, but the mesh has "
            f"data={mesh.shape['data']}, fsdp={mesh.shape['fsdp']}: give both at least 2, or use 'ring'"
        )
    route = make_route(mesh, axes, {"gather": axes, "ring": (), "hierarchical": axes[1:]}[form])
    rows, keys = batch // devices, keys // devices * route.gathered
    copies = 1 if route.gather else 2  # a block and the one that follows it
    # A gathered gradient exists once more while it is summed over devices.
    block = (
        copies * keys * width * (feature_bytes + collected * (2 if route.gather else 1)) + rows * width * 4
    )
    kernel = _kernel(mesh, route, rows, keys, width, dtype, terms)
    return Choice(form, route, tile, kernel, block + _tile_bytes(tile, rows, keys, width, feature_bytes))


def _kernel(
    mesh: Mesh, route: Route, rows: int, keys: int, width: int, dtype: Any, terms: Terms | None
) -> str:
    """What computes a block: our kernel where there is one for these devices, this loss and these sizes."""
    device = mesh.devices.flat[0]
    # Below some rows a device, padding them to whole tiles of the kernel costs more than it saves.
    long = rows // (2 if route.two_way else 1) >= tpu_kernel.ROWS
    fits = tpu_kernel.serves(terms, keys, width, dtype) and not device.device_kind.startswith(SMALL_CORES)
    return KERNELS.get(device.platform, "xla") if long and fits else "xla"


def _tile_bytes(tile: int, rows: int, keys: int, width: int, feature_bytes: int) -> int:
    """Scores and slopes of a tile, fp32 and as the features, and its part of the gradients."""
    return min(tile, rows) * min(tile, keys) * (8 + feature_bytes) + 2 * min(tile, keys) * width * 4


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
