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
    slices = len({_slice(device) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return _gather_processes(grid)
    data, fsdp, tensor = shape
    over_data = math.gcd(data, slices)
    over_fsdp = slices // over_data
    if fsdp % over_fsdp:
        raise RecipeError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {slices} slices of "
            f"{len(devices) // slices} devices: make data a multiple of {slices}"
        )
    within = (data // over_data, fsdp // over_fsdp, tensor)
    grid = mesh_utils.create_hybrid_device_mesh(
        within, (over_data, over_fsdp, 1), devices, allow_split_physical_axes=True
    )
    return _gather_processes(grid)


def _slice(device: Any) -> int:
    """The set of devices joined by fast links that a device belongs to; backends without slices are one."""
    return getattr(device, "slice_index", 0)


def _gather_processes(grid: np.ndarray) -> np.ndarray:
    """The same grid with positions along the batch reordered until each process holds one run of them.

    A physical layout may give a host rows here and there, but a host reads its rows as one range. Reordering
    whole entries of `data` leaves every `fsdp` and `tensor` group as it was; only if that is not enough are
    the groups of `fsdp` mixed as well.
    """

    def order(blocks: np.ndarray) -> list[int]:
        return sorted(
            range(len(blocks)), key=lambda i: (_slice(blocks[i].flat[0]), blocks[i].flat[0].process_index)
        )

    by_data = grid[order(grid)]
    if all(_is_run(blocks) for blocks in _blocks_of_processes(by_data).values()):
        return by_data
    columns = grid.reshape(-1, grid.shape[2])
    return columns[order(columns)].reshape(grid.shape)


def _blocks_of_processes(grid: np.ndarray) -> dict[int, tuple[int, ...]]:
    """For each process, the positions along the batch at which it has a device."""
    found: dict[int, set[int]] = {}
    for position, column in enumerate(grid.reshape(-1, grid.shape[2])):
        for device in column:
            found.setdefault(device.process_index, set()).add(position)
    return {process: tuple(sorted(blocks)) for process, blocks in found.items()}


def _is_run(blocks: tuple[int, ...]) -> bool:
    return blocks[-1] - blocks[0] + 1 == len(blocks)


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
    """The rows of the global batch that this process supplies, one range.

    Processes that hold the same rows (a `tensor` axis across processes) are given the same range.

    Raises:
      RecipeError: a batch size the mesh cannot cut, or a mesh whose processes share only part of their rows.
    """
    check_batch_size(batch_size, mesh)
    block = batch_size // batch_shards(mesh)
    first, count = _local_blocks(mesh)
    return range(first * block, (first + count) * block)


@functools.lru_cache(maxsize=16)
def _local_blocks(mesh: Mesh) -> tuple[int, int]:
    """First position along the batch of this process, and how many it has."""
    return share_of(jax.process_index(), _blocks_of_processes(mesh.devices))


def share_of(process: int, blocks: Mapping[int, tuple[int, ...]]) -> tuple[int, int]:
    """First block and number of blocks of `process`, given the blocks that each process holds.

    Raises RecipeError unless every two processes hold the same run of blocks or none in common.
    """
    groups = set(blocks.values())
    together = [block for group in groups for block in group]
    if len(set(together)) != len(together) or not all(_is_run(group) for group in groups):
        raise RecipeError(
            f"this mesh gives {len(blocks)} processes overlapping or scattered parts of the batch: choose "
            "tensor so that it divides the devices of one process, or is a multiple of them"
        )
    return blocks[process][0], len(blocks[process])


def to_global(local: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Global arrays `[batch_size, ...]` from the rows `local_rows(mesh, batch_size)` of this process.

    Row i of a global array is row i of the batch, whatever the mesh and the number of processes.

    Raises ValueError when an array does not have the rows of this process.
    """
    rows, sharding = local_rows(mesh, batch_size), batch_sharding(mesh)
    arrays = {}
    for name, value in local.items():
        if len(value) != len(rows):
            raise ValueError(f"{name}: {len(value)} rows, this process supplies {len(rows)} of {batch_size}")
        shape = (batch_size, *value.shape[1:])
        places = sharding.addressable_devices_indices_map(shape)
        blocks = [_block(value, rows.start, index) for index in places.values()]
        # Device by device: an explicit transfer, which the transfer guard around a step lets through.
        on_device = jax.device_put(blocks, list(places))
        arrays[name] = jax.make_array_from_single_device_arrays(shape, sharding, on_device)
    return arrays


def _block(value: np.ndarray, first: int, index: tuple[slice, ...]) -> np.ndarray:
    """What a device holds by global rows, out of the rows of this process, of which `first` is the first."""
    start, stop = index[0].start or 0, index[0].stop
    return value[start - first : None if stop is None else stop - first]
