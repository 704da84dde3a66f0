"""The links between devices, and how long a collective takes on them."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmjax.planning.chips import Chip

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "collective-broadcast",
    "ragged-all-to-all",
)


class Place(NamedTuple):
    """Where a device is: the island of fast links (slice or host) it belongs to, and its position there."""

    island: int
    coordinates: tuple[int, ...]


class Fabric:
    """Devices in the order of the program's own numbers, and what their links carry.

    A model of bandwidth alone: no latency, no sharing of links between transfers, no routes of several hops.
    """

    def __init__(self, devices: Sequence[Any], chip: Chip | None):
        """`devices` as in `mesh.devices.flat`; without a chip every transfer takes no time."""
        self.places, self.chip = [_place(device) for device in devices], chip

    def seconds(self, kind: str, size: int, attributes: str) -> float:
        """Seconds of one collective.

        Args:
          kind: one of KINDS.
          size: bytes of the whole buffer: what all-gather gives, what reduce-scatter takes.
          attributes: of its instruction, with its replica groups or its pairs.
        """
        if self.chip is None:
            return 0.0
        if kind == "collective-permute":
            far = any(self._island(a) != self._island(b) for a, b in pairs(attributes))
            return size / (self.chip.network if far else self.chip.link)
        group = first_group(attributes, len(self.places))
        islands = {self._island(device) for device in group}
        outer, inner = len(islands), max(len(group) // len(islands), 1)
        rounds = 2 if kind == "all-reduce" else 1  # a reduction and a gathering
        if kind.endswith(
            "all-to-all"
        ):  # every device sends its own buffer once: a quarter of gathering them all
            size, rounds = size * len(group), 0.25
        fast = size * (len(group) - 1) / len(group) / (self._ports(group) * self.chip.link)
        slow = size * (outer - 1) / outer / inner / self.chip.network
        return rounds * (fast * (inner > 1) + slow)

    def between_slices(self, kind: str, size: int) -> float:
        """Seconds of the part of a collective that goes between slices, `size` bytes of each device taking part."""
        if self.chip is None:
            return 0.0
        slices = len({place.island for place in self.places})
        others = (slices - 1) / slices
        share = {"all-reduce": 2 * others, "all-gather": slices - 1, "one-to-one": 1}.get(kind, others)
        return share * size / self.chip.network

    def _island(self, device: int) -> int:
        return self.places[device].island if device < len(self.places) else 0

    def _ports(self, group: Sequence[int]) -> int:
        """Links that a ring over the group uses at once: both directions of every axis it spans."""
        if self.chip.ports == 1:
            return 1
        axes = zip(*(self.places[i].coordinates for i in group if i < len(self.places)), strict=True)
        spanned = sum(len(set(axis)) > 1 for axis in axes)
        return min(2 * max(spanned, 1), self.chip.ports)


def _place(device: Any) -> Place:
    coordinates = getattr(device, "coords", None)
    if device.platform == "tpu":
        return Place(getattr(device, "slice_index", 0) or 0, tuple(coordinates))
    return Place(device.process_index, (device.id,))


def pairs(attributes: str) -> list[tuple[int, int]]:
    """(source, target) of each transfer of a collective-permute."""
    found = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", found[1])] if found else []


def first_group(attributes: str, devices: int) -> list[int]:
    """The first group of devices that a collective joins, in any of XLA's notations; all of them by default."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return [int(i) for i in found[1].split(",")]
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        sizes = [int(i) for i in found[3].split(",")]
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        if found[4]:
            numbers = numbers.transpose([int(i) for i in found[4].split(",")])
        return numbers.reshape(int(found[1]), int(found[2]))[0].tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        return _mesh_group(found[1], found[2], devices)
    return list(range(devices))


def _mesh_group(mesh: str, axes: str, devices: int) -> list[int]:
    """A group given as axes of a mesh, such as `'a'=2,'b'=4` and `'b'`, or `'b':(2)2` for a part of an axis."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    numbers = np.arange(math.prod(sizes.values()))
    if len(numbers) != devices:
        return list(range(devices))
    split, taken = [], []
    wanted = {
        n: (int(a or 1), int(b or sizes[n])) for n, a, b in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    for name, size in sizes.items():
        before, part = wanted.get(name, (1, 1))
        split += [before, part, size // (before * part)]
        taken += [slice(1), slice(None) if name in wanted else slice(1), slice(1)]
    return numbers.reshape(split)[tuple(taken)].ravel().tolist()
