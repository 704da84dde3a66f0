"""Mesh shapes, slices, and the way from the rows of a process to global arrays."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from vlmjax.errors import RecipeError
from vlmjax.sharding.mesh import (
    batch_sharding,
    batch_shards,
    check_batch_size,
    device_grid,
    local_rows,
    make_mesh,
    replicated,
    share_of,
    to_global,
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as the layout looks at."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"
    device_kind: str = "paper"


def chips(slices, hosts, per_host):
    """`slices` slices of `hosts` hosts each."""
    return [
        Chip((s * hosts + h) * per_host + c, s * hosts + h, s)
        for s in range(slices)
        for h in range(hosts)
        for c in range(per_host)
    ]


def test_the_default_mesh_puts_all_devices_on_data():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert list(mesh.devices.flat) == jax.devices()


def test_data_takes_what_is_left_over():
    assert dict(make_mesh(fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(-1, 3, devices=jax.devices()[:6]).shape) == {"data": 2, "fsdp": 3, "tensor": 1}


@pytest.mark.parametrize(
    "sizes", [(3, 1, 1), (8, 2, 1), (-1, 3, 1), (-1, 16, 1), (0, 8, 1), (-2, 1, 1), (8, 0, 1)]
)
def test_sizes_that_do_not_fit_are_refused_with_the_sizes(sizes):
    with pytest.raises(RecipeError, match=f"data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}"):
        make_mesh(*sizes)


def test_slices_lie_along_data():
    grid = device_grid((4, 2, 2), chips(slices=2, hosts=2, per_host=4))
    assert grid.shape == (4, 2, 2)
    assert [{c.slice_index for c in row.flat} for row in grid] == [{0}, {0}, {1}, {1}]


def test_slices_spill_over_to_fsdp_when_data_is_too_small_but_never_to_tensor():
    grid = device_grid((2, 4, 2), chips(slices=4, hosts=1, per_host=4))
    for group in grid.reshape(-1, 2):
        assert len({c.slice_index for c in group}) == 1
    with pytest.raises(RecipeError, match="make data a multiple of 4"):
        device_grid((2, 1, 8), chips(slices=4, hosts=1, per_host=4))


def test_a_layout_that_scatters_hosts_is_reordered_without_touching_the_groups(monkeypatch):
    """A torus read row by row meets the same host again and again."""
    devices = chips(slices=1, hosts=2, per_host=4)
    scattered = np.array([devices[i] for i in (0, 1, 4, 5, 2, 3, 6, 7)], object)
    monkeypatch.setattr(
        "vlmjax.sharding.mesh.mesh_utils.create_device_mesh", lambda shape, *a, **k: scattered.reshape(shape)
    )
    assert [c.process_index for c in device_grid((8, 1, 1), devices).flat] == [0] * 4 + [1] * 4
    pairs = device_grid((4, 1, 2), devices)
    assert [tuple(c.id for c in pair) for pair in pairs.reshape(-1, 2)] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    # One fsdp group has both hosts here: only mixing the groups gives each host a run.
    assert [c.process_index for c in device_grid((2, 4, 1), devices).flat] == [0] * 4 + [1] * 4


def test_shares_of_processes():
    assert share_of(1, {0: (0, 1), 1: (2, 3)}) == (2, 2)
    assert share_of(1, {0: (0,), 1: (0,), 2: (1,), 3: (1,)}) == (0, 1)
    assert share_of(0, {0: (1, 2), 1: (0,)}) == (1, 2)
    with pytest.raises(RecipeError, match="overlapping or scattered"):
        share_of(0, {0: (0, 1), 1: (1, 2)})
    with pytest.raises(RecipeError, match="overlapping or scattered"):
        share_of(0, {0: (0, 2), 1: (1, 3)})


def test_one_process_supplies_every_row():
    assert local_rows(make_mesh(fsdp=2, tensor=2), 12) == range(12)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 1)])
def test_global_arrays_hold_the_rows_in_order(shape):
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    batch = {
        "pixel_values": np.arange(16 * 3, dtype=np.uint8).reshape(16, 3, 1, 1),
        "valid": np.arange(16) % 3 == 0,
        "caption_id": np.arange(16, dtype=np.uint32),
    }
    with jax.transfer_guard("disallow"):
        arrays = to_global(batch, mesh, 16)
    for name, value in batch.items():
        assert arrays[name].sharding == batch_sharding(mesh)
        assert arrays[name].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(arrays[name]), value)
    rows = 16 // batch_shards(mesh)
    assert {shard.data.shape for shard in arrays["caption_id"].addressable_shards} == {(rows,)}


def test_an_array_with_too_few_rows_is_refused_by_name():
    with pytest.raises(ValueError, match="valid: 8 rows, this process supplies 16 of 16"):
        to_global({"valid": np.ones(8, bool)}, make_mesh(), 16)


def test_batch_sizes():
    mesh = make_mesh(fsdp=2, tensor=2)
    for size, micro in [(4, 1), (16, 2), (64, 16)]:
        check_batch_size(size, mesh, micro)
    with pytest.raises(RecipeError, match=r"batch_size = 18 .* multiple of 8, such as 16 or 24"):
        check_batch_size(18, mesh, 2)
    with pytest.raises(RecipeError, match=r"batch_size = 3 .* multiple of 8, such as 8$"):
        check_batch_size(3, mesh, 2)
    with pytest.raises(RecipeError, match=r"batch_size = 0 .* such as 4"):
        check_batch_size(0, mesh)


def test_replicated_is_everywhere():
    assert replicated(make_mesh()).spec == PartitionSpec()
    assert replicated(make_mesh()).is_fully_replicated
