"""The mesh every array lives on, and the way from the rows one process holds to global arrays."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlmjax.errors import RecipeError

AXES = ("data", "fsdp", "tensor")
# Examples are spread over both: `fsdp` also holds slices of the parameters, `data` holds copies of them.
BATCH_AXES = ("data", "fsdp")


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of all devices with axes `data`, `fsdp`, `tensor`.

    Args:
      data: copies of the model; -1 takes whatever the other two leave over.
      fsdp: parts the parameters and the optimizer state are cut into.
      tensor: devices that share the work on one example.
      devices: default all devices of all processes.

    Raises:
      RecipeError: a size below 1, or sizes that do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = _mesh_shape((data, fsdp, tensor), len(devices))
    return Mesh(device_grid(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _mesh_shape(sizes: tuple[int, int, int], devices: int) -> tuple[int, int, int]:
    data, fsdp, tensor = sizes
    asked = f"mesh data={data}, fsdp={fsdp}, tensor={tensor}"
    if fsdp < 1 or tensor < 1 or (data < 1 and data != -1):
        raise RecipeError(f"{asked}: sizes are at least 1; only data may be -1, for all that is left over")
    if data == -1:
        data = devices // (fsdp * tensor)
    if data * fsdp * tensor != devices:
        raise RecipeError(
            f"{asked} does not fit {devices} device(s): data * fsdp * tensor must be {devices}; "
            "data=-1 takes what fsdp and tensor leave over"
        )
    return data, fsdp, tensor


def device_grid(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """Devices in mesh order: fast links under `tensor` and `fsdp`, the network between slices under `data`.

    Raises RecipeError when several slices cannot be laid along `data` (and, failing that, `fsdp`).
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, fsdp, tensor = shape
    over_data = math.gcd(data, slices)
    over_fsdp = slices // over_data
    if fsdp % over_fsdp:
        raise RecipeError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {slices} slices of "
            f"{len(devices) // slices} devices: make data a multiple of {slices}"
        )
    within = (data // over_data, fsdp // over_fsdp, tensor)
    return mesh_utils.create_hybrid_device_mesh(
        within, (over_data, over_fsdp, 1), devices, allow_split_physical_axes=True
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`, the same on every device along `tensor`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Number of parts the rows of a batch are cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(batch_size: int, mesh: Mesh, micro_batches: int = 1) -> None:
    """Raise RecipeError unless every micro-batch puts the same whole number of rows on every device."""
    unit = batch_shards(mesh) * micro_batches
    if batch_size > 0 and batch_size % unit == 0:
        return
    above = max(1, math.ceil(batch_size / unit)) * unit
    below = max(unit, above - unit)
    near = f"{above}" if above == below else f"{below} or {above}"
    raise RecipeError(
        f"batch_size = {batch_size} cannot be cut evenly: {batch_shards(mesh)} devices hold rows of it, in "
        f"{micro_batches} micro-batch(es), so it must be a multiple of {unit}, such as {near}"
    )


def local_rows(mesh: Mesh, batch_size: int) -> range:
    """The rows of the global batch that this process supplies.

    Processes that hold the same rows (a `tensor` axis across processes) are given the same range. Ranges are
    dealt in the order of the processes' first block; where the mesh gives a process blocks that do not touch,
    the rows of its range fill them in order.

    Raises:
      RecipeError: a batch size the mesh cannot cut, or a mesh whose processes share only part of their rows.
    """
    rank, rows = _layout(mesh, batch_size)
    return range(rank * rows, (rank + 1) * rows)


def to_global(local: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Global arrays `[batch_size, ...]` from the rows `local_rows(mesh, batch_size)` of this process.

    Raises ValueError when an array does not have that many rows.
    """
    rows = len(local_rows(mesh, batch_size))
    sharding, blocks = batch_sharding(mesh), _local_blocks(mesh, batch_size)
    arrays = {}
    for name, value in local.items():
        if len(value) != rows:
            raise ValueError(
                f"{name}: {len(value)} rows, expected the {rows} this process supplies of {batch_size}"
            )
        shape = (batch_size, *value.shape[1:])
        arrays[name] = jax.make_array_from_callback(shape, sharding, functools.partial(_block, value, blocks))
    return arrays


def _block(value: np.ndarray, blocks: dict[int, int], index: tuple[slice, ...]) -> np.ndarray:
    """The rows a device asks for by their global index, out of the rows of this process."""
    start, stop = index[0].start or 0, index[0].stop
    here = blocks[start]
    return value[here:] if stop is None else value[here : here + stop - start]


@functools.lru_cache(maxsize=64)
def _starts(mesh: Mesh, batch_size: int) -> dict[int, tuple[int, ...]]:
    """For each process, the first rows of the blocks its devices hold, in order."""
    check_batch_size(batch_size, mesh)
    starts: dict[int, set[int]] = {}
    for device, index in batch_sharding(mesh).devices_indices_map((batch_size,)).items():
        starts.setdefault(device.process_index, set()).add(index[0].start or 0)
    return {process: tuple(sorted(found)) for process, found in starts.items()}


@functools.lru_cache(maxsize=64)
def _local_blocks(mesh: Mesh, batch_size: int) -> dict[int, int]:
    """First global row of each block of this process -> its first row among those the process holds."""
    size = batch_size // batch_shards(mesh)
    return {start: i * size for i, start in enumerate(_starts(mesh, batch_size)[jax.process_index()])}


@functools.lru_cache(maxsize=64)
def _layout(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """This process' place among the groups of processes that hold the same rows, and the rows of a group."""
    return layout_of(_starts(mesh, batch_size), jax.process_index(), batch_size)


def layout_of(starts: Mapping[int, tuple[int, ...]], process: int, batch_size: int) -> tuple[int, int]:
    """Place and size of the share of `process`, given the blocks each process holds.

    Raises RecipeError when shares overlap in part or differ in size: no cut into equal ranges exists then.
    """
    groups = sorted(set(starts.values()))
    blocks = [block for group in groups for block in group]
    if len(set(blocks)) != len(blocks) or len({len(group) for group in groups}) != 1:
        raise RecipeError(
            f"this mesh gives {len(starts)} processes unequal or partly shared parts of the batch; "
            "choose tensor to divide, or be a multiple of, the devices of one process"
        )
    return groups.index(starts[process]), batch_size // len(groups)
