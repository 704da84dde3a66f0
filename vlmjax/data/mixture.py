"""Several sources as one endless sequence: who supplies each position of a run, and which of its examples."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmjax.data import blocks, plan
from vlmjax.errors import DataError

MIXES = ("size", "sqrt", "equal")
_PATTERN = 0x6D6978  # keeps the draws of the pattern apart from those of the epochs
_SHORTEST, _LONGEST = 1_000, 1_000_000
_LEAST = 1e-4  # of a weight, and its inverse the most: a share far smaller would be rounded to one place in a cycle
_SEEN_PER_CYCLE = 10  # of the rarest source: rounds its share by at most one part in twenty


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a mixture.

    Attributes:
        name, fingerprint, size: of the source.
        share: the part of all positions it supplies, above 0.
        stream: its number among all sources the run ever had; with the seed it fixes the order of its epochs.
        drawn: how many examples the run had taken from it before this mixture began.
        layout: a number of the blocks it is shuffled in, 0 for none; set by the mixture.
        ends: ends of the blocks it is shuffled in (see `blocks`), None to shuffle it as a whole.
    """

    name: str
    fingerprint: str
    size: int
    share: float
    stream: int = 0
    drawn: int = 0
    layout: int = 0
    ends: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    def state(self) -> list[Any]:
        """What a checkpoint keeps of it, short: a state has to stay small with many sources."""
        return [
            self.name[-16:],
            self.fingerprint,
            self.size,
            self.share,
            self.stream,
            self.drawn,
            self.layout,
        ]

    @classmethod
    def from_state(cls, value: Sequence[Any]) -> "Part":
        """Inverse of `state`; without blocks."""
        return cls(*value)


def shares(sizes: Sequence[int], mix: str = "size", weights: Sequence[float] = ()) -> tuple[float, ...]:
    """The part of a run that each source supplies: by its size, the root of it, or equally, times its weight.

    Explicit shares are `mix="equal"` with the shares as weights.

    Args:
        sizes: examples of each source.
        mix: one of MIXES.
        weights: a factor for each source, or none.

    Raises:
        DataError: an unknown mix, another number of weights than sources, a weight that is not above 0.
    """
    if mix not in MIXES:
        raise DataError(f"mix={mix!r} is none of {', '.join(MIXES)}")
    if weights and len(weights) != len(sizes):
        raise DataError(
            f"weights={tuple(weights)!r}: {len(weights)} given for {len(sizes)} sources, one each wanted"
        )
    if not all(_LEAST <= weight <= 1 / _LEAST for weight in weights):
        raise DataError(
            f"weights={tuple(weights)!r}: expected numbers from 0.0001 to 10,000; to leave a source out, do not name it"
        )
    power = {"size": 1.0, "sqrt": 0.5, "equal": 0.0}[mix]
    raw = [size**power * weight for size, weight in zip(sizes, weights or [1.0] * len(sizes), strict=True)]
    return tuple(float(f"{value / sum(raw):.9g}") for value in raw)  # short in a checkpoint


class Mixture:
    """The example at every global position from `start` on, without end: `mixture(positions) -> indices`.

    A pattern of source numbers, shuffled once and repeated, gives the shares; the n-th place that names a source
    takes the n-th example of that source's own endless order, each epoch of which is a permutation. So every
    source is seen evenly and whole, whatever its share, and any position costs the same. Indices count through
    the sources as if they stood one after the other.
    """

    def __init__(
        self, parts: Sequence[Part], seed: int, start: int = 0, version: int = 1, streams: int | None = None
    ):
        """See `followed_by` for all mixtures of a run but its first.

        Args:
            parts: the sources.
            seed: of the run.
            start: the first position of this mixture in the run.
            version: which of the run's mixtures it is.
            streams: how many sources the run ever had; these by default.
        """
        self.seed, self.start, self.version = seed, start, version
        self.streams = len(parts) if streams is None else streams
        counts = _counts([part.size for part in parts], [part.share for part in parts])
        self._cycle, self._counts = int(counts.sum()), counts
        labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        order = plan.permutation(plan.mix64(seed, _PATTERN), version, self._cycle)
        self._labels = labels[order]
        self._ranks = np.empty(self._cycle, np.int64)
        for label in range(len(counts)):
            self._ranks[self._labels == label] = np.arange(counts[label])
        self._first = np.concatenate([[0], np.cumsum([part.size for part in parts])[:-1]]).astype(np.int64)
        self._orders = [
            blocks.Order(part.size, plan.mix64(seed, part.stream) if part.stream else seed, part.ends)
            for part in parts
        ]
        # Of a checkpoint's mixture the blocks themselves are not known, only their number.
        self.parts = tuple(
            part if part.ends is None else dataclasses.replace(part, layout=order.layout)
            for part, order in zip(parts, self._orders, strict=True)
        )

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The example at each global position (int64, any shape, each at least `start`): int64, the same shape."""
        after = np.asarray(positions, np.int64) - self.start
        if after.min(initial=0) < 0:
            raise ValueError(
                f"position {int(after.min()) + self.start} is before this mixture, from {self.start} on"
            )
        cycles, places = np.divmod(after, self._cycle)
        labels, out = self._labels[places], np.empty_like(places)
        for label in np.unique(labels):
            here = labels == label
            turns = cycles[here] * self._counts[label] + self._ranks[places[here]] + self.parts[label].drawn
            out[here] = self._first[label] + self._orders[label](turns)
        return out

    def drawn(self, position: int) -> list[int]:
        """How many examples each source has supplied to all positions below `position`, its earlier ones included."""
        cycles, place = divmod(position - self.start, self._cycle)
        partly = np.bincount(self._labels[:place], minlength=len(self.parts))
        whole = cycles * self._counts + partly
        return [part.drawn + int(count) for part, count in zip(self.parts, whole, strict=True)]

    def followed_by(self, parts: Sequence[Part], position: int) -> "Mixture":
        """The next mixture of the run, from `position` on: sources it knows go on where they were, new ones begin."""
        known = {
            part.fingerprint: (part, drawn)
            for part, drawn in zip(self.parts, self.drawn(position), strict=True)
        }
        unused = self.streams
        after = []
        for part in parts:
            if part.fingerprint in known:
                old, drawn = known[part.fingerprint]
                if old.layout != part.layout:
                    drawn = (
                        -(-drawn // part.size) * part.size
                    )  # another order: it begins with an epoch of its own
                after.append(dataclasses.replace(part, stream=old.stream, drawn=drawn))
            else:
                after.append(dataclasses.replace(part, stream=unused, drawn=0))
                unused += 1
        return Mixture(after, self.seed, position, self.version + 1, unused)

    def describe(self) -> str:
        """The sources and their shares in words: 'cc (3,000 records) 75.0 %, sbu (1,000 records) 25.0 %'."""
        if len(self.parts) == 1:
            return f"{self.parts[0].name} ({self.parts[0].size:,} records)"
        return ", ".join(f"{part.name} ({part.size:,} records) {part.share:.1%}" for part in self.parts)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: version, first position, and the sources."""
        return {
            "version": self.version,
            "start": self.start,
            "streams": self.streams,
            "sources": [part.state() for part in self.parts],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], seed: int) -> "Mixture":
        """The mixture of a checkpoint, good for counting: it knows no blocks."""
        parts = [Part.from_state(value) for value in state["sources"]]
        return cls(parts, seed, int(state["start"]), int(state["version"]), int(state["streams"]))


def parts_of(sources: Sequence[Any], share: Sequence[float]) -> list[Part]:
    """Sources as parts, numbered in their order.

    Raises:
        DataError: the same data twice, which would be the same pictures under two names.
    """
    parts, seen = [], {}
    for number, (source, part) in enumerate(zip(sources, share, strict=True)):
        if source.fingerprint in seen:
            raise DataError(
                f"{source.name} holds the same data as {seen[source.fingerprint]}: name it once, and to see it more "
                "often give it a weight"
            )
        seen[source.fingerprint] = source.name
        ends = getattr(source, "blocks", None)
        parts.append(Part(source.name, source.fingerprint[:12], len(source), float(part), number, ends=ends))
    return parts


def _counts(sizes: Sequence[int], share: Sequence[float]) -> np.ndarray:
    """Whole places of one cycle for each source, by largest remainder, at least one each: int64."""
    if len(share) == 1:
        return np.ones(1, np.int64)
    if sum(sizes) <= _LONGEST and np.allclose(share, shares(sizes), rtol=1e-9, atol=0):
        return np.array(sizes, np.int64)  # by size: one cycle is then an epoch of every source, exactly
    cycle = min(_LONGEST, max(_SHORTEST, math.ceil(_SEEN_PER_CYCLE / min(share))))
    exact = np.asarray(share) * cycle
    counts = np.floor(exact).astype(np.int64)
    for label in np.argsort(counts - exact, kind="stable")[: cycle - int(counts.sum())]:
        counts[label] += 1
    return np.maximum(counts, 1)


def difference(before: Sequence[Part], after: Sequence[Part]) -> str:
    """What changed between two mixtures, in words: sources gone, sources new, shares."""
    old, new = ({part.fingerprint: part for part in parts} for parts in (before, after))
    told = [f"{part.name} ({part.size:,} examples) is gone" for key, part in old.items() if key not in new]
    told += [f"{part.name} ({part.size:,} examples) is new" for key, part in new.items() if key not in old]
    told += [
        f"the share of {part.name} was {old[key].share:.4g} and is {part.share:.4g}"
        for key, part in new.items()
        if key in old and old[key].share != part.share
    ]
    told += [
        f"{part.name} was shuffled {_how(old[key].layout)} and is now shuffled {_how(part.layout)}"
        for key, part in new.items()
        if key in old and old[key].layout != part.layout
    ]
    return ", ".join(told) or "its sources stand in another order"


def _how(layout: int) -> str:
    return (
        f"in blocks (layout {layout}), as remote shards are" if layout else "as a whole, as local shards are"
    )
