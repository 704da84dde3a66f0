"""The order in which devices hand blocks round a ring, so that every hop is one link long."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh


def ring_order(devices: Sequence[Any]) -> list[int]:
    """Positions in `devices`, ordered so that neighbours in it, and its two ends, are neighbours on the chip grid.

    TPU slices are grids of chips with links along the axes. Some (v5e beyond 4x4) can only send along one axis at a
    time, so a ring in the order of device numbers, whose hops change row and column at once, loses its overlap with
    compute. The order here goes up the first column and then back and forth over the rest. Slices follow one another.
    Devices without coordinates keep their order, as do those that fill no grid.
    """
    found: list[int] = []
    for part in _slices(devices):
        found += _slice_order([devices[i] for i in part], part)
    return found


@functools.lru_cache(maxsize=64)
def ring_cycle(mesh: Mesh, axes: tuple[str, ...]) -> tuple[int, ...]:
    """`ring_order` of the positions along some axes of a mesh, as row-major indices over those axes."""
    return tuple(ring_order(list(devices_along(mesh.devices, mesh.axis_names, axes).flat)))


def devices_along(grid: np.ndarray, names: Sequence[str], axes: Sequence[str]) -> np.ndarray:
    """The devices of a mesh along some of its axes, at the first position of the others."""
    return grid[tuple(slice(None) if name in axes else 0 for name in names)]


def _slices(devices: Sequence[Any]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i, device in enumerate(devices):
        groups.setdefault(getattr(device, "slice_index", 0) or 0, []).append(i)
    return [groups[key] for key in sorted(groups)]


def _slice_order(devices: list[Any], positions: list[int]) -> list[int]:
    if any(getattr(device, "coords", None) is None for device in devices):
        return positions
    # Several cores of a chip share its place: they stand side by side in the ring.
    places: dict[tuple[int, ...], list[int]] = {}
    for device, position in zip(devices, positions, strict=True):
        places.setdefault(tuple(device.coords), []).append(position)
    low, high = np.min(list(places), axis=0), np.max(list(places), axis=0)
    shape = tuple(int(n) for n in high - low + 1)
    if len(places) != math.prod(shape):
        return positions
    path = _cycle([n for n in shape if n > 1])
    axes = [i for i, n in enumerate(shape) if n > 1]
    order: list[int] = []
    for point in path:
        place = [int(x) for x in low]
        for axis, x in zip(axes, point, strict=True):
            place[axis] += x
        order += places[tuple(place)]
    return order


def _cycle(shape: list[int]) -> list[tuple[int, ...]]:
    """A closed walk over all points of a grid in steps of one, where there is one (some side is even)."""
    if not shape:
        return [()]
    if len(shape) == 1:
        return [(x,) for x in range(shape[0])]
    # The side that is walked to and fro must be even, so that the walk ends beside its start.
    even = next((i for i, n in enumerate(shape) if n % 2 == 0), 0)
    rest = shape[:even] + shape[even + 1 :]
    inner = _path(rest)
    start, others = inner[0], inner[1:]
    walk = [(x, start) for x in range(shape[even])]
    for step, x in enumerate(reversed(range(shape[even]))):
        walk += [(x, point) for point in (others if step % 2 == 0 else others[::-1])]
    return [(*point[:even], x, *point[even:]) for x, point in walk]


def _path(shape: list[int]) -> list[tuple[int, ...]]:
    """An open walk over all points of a grid in steps of one: to and fro along the last axis."""
    if len(shape) == 1:
        return [(x,) for x in range(shape[0])]
    inner = _path(shape[1:])
    return [(x, *point) for x in range(shape[0]) for point in (inner if x % 2 == 0 else inner[::-1])]
