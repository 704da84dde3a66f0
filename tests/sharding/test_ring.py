"""The ring follows links: every hop one step on the grid of chips, and back to its start."""

import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from vlmjax.sharding.mesh import make_mesh
from vlmjax.sharding.ring import devices_along, ring_cycle, ring_order


def chips(shape, *, cores=1, slices=1, seed=0):
    """Devices of a grid in an order that says nothing about their places."""
    made = [
        SimpleNamespace(coords=coords, core_on_chip=core, slice_index=part)
        for part in range(slices)
        for coords in itertools.product(*map(range, shape))
        for core in range(cores)
    ]
    return [made[i] for i in np.random.default_rng(seed).permutation(len(made))]


def steps(devices, order):
    """For each hop of a ring, how far it goes along each axis, and whether it leaves its slice."""
    around = zip(order, [*order[1:], order[0]], strict=True)
    for a, b in around:
        one, two = devices[a], devices[b]
        yield (
            sum(abs(x - y) for x, y in zip(one.coords, two.coords, strict=True)),
            one.slice_index != two.slice_index,
        )


@pytest.mark.parametrize(
    "shape", [(4, 4), (16, 16), (2, 3), (3, 4), (4, 4, 4), (3, 2, 5), (3, 5, 4), (2, 2, 1)]
)
def test_every_hop_is_one_link(shape):
    devices = chips(shape)
    order = ring_order(devices)
    assert sorted(order) == list(range(len(devices)))
    assert {distance for distance, _ in steps(devices, order)} == {1}


def test_cores_of_a_chip_stand_side_by_side():
    devices = chips((4, 4), cores=2)
    order = ring_order(devices)
    assert sorted(order) == list(range(32))
    assert sorted(distance for distance, _ in steps(devices, order)) == [0] * 16 + [1] * 16


def test_slices_follow_one_another():
    devices = chips((4, 4), slices=3)
    hops = list(steps(devices, ring_order(devices)))
    assert sum(leaves for _, leaves in hops) == 3
    assert all(distance == 1 for distance, leaves in hops if not leaves)


def test_what_fills_no_grid_or_has_no_place_keeps_its_order():
    devices = chips((4, 4))[:7]
    assert ring_order(devices) == list(range(7))
    assert ring_order(jax.devices()) == list(range(8))


def test_a_cycle_names_positions_along_the_axes_of_a_mesh():
    """On a mesh of another order than the grid's, the cycle still steps from chip to chip."""
    devices = chips((4, 4), seed=3)
    grid = np.empty((2, 2, 4), object)
    grid.flat[:] = devices
    along = list(devices_along(grid, ("data", "fsdp", "tensor"), ("data", "tensor")).flat)
    assert along == [*devices[:4], *devices[8:12]]
    assert {distance for distance, _ in steps(devices, ring_order(devices))} == {1}
    real = make_mesh(2, 2, 2)
    assert isinstance(real, Mesh) and sorted(ring_cycle(real, ("data", "tensor"))) == [0, 1, 2, 3]
