"""Batches of rows that are alike: one example a row, grouped by length and by whether there are images at all."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vlmjax.data import bucketing, plan
from vlmjax.data.windows import BEGINNING, Place, Windows

Measure = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Group(NamedTuple):
    """A batch: the length of its rows, whether they have places for images, and the examples in them.

    Examples are numbers inside the window. Only the last batch of a window may have fewer than it has rows.
    """

    tokens: int
    with_images: bool
    examples: np.ndarray


class Groups(NamedTuple):
    """The batches of one window, in the order of training."""

    batches: list[Group]

    @property
    def rows(self) -> int:
        """How many batches there are: the unit that `windows.Windows` counts."""
        return len(self.batches)


def group(
    tokens: np.ndarray,
    images: np.ndarray,
    lengths: Sequence[int],
    size: int,
    *,
    seed: int = 0,
    window: int = 0,
) -> Groups:
    """Deal the examples of a window into batches of `size` rows of like length, those without images among themselves.

    An example goes to the smallest length that holds it. What fills no batch of its length moves up to the next, and
    what is left of those without images goes along with the others; so every example is in one batch, and at most one
    batch of a window is not full. A pure function; batches come in an order shuffled by (seed, window).

    Args:
        tokens, images: of each example, int [n]; none has more tokens than the last length.
        lengths: that rows are padded to, increasing.
        size: rows of a batch.
    """
    tokens, images, sizes = np.asarray(tokens), np.asarray(images), [size] * len(lengths)
    words, rest = bucketing.fill(tokens, np.flatnonzero(images == 0), lengths, sizes)
    others = np.sort(np.concatenate([np.flatnonzero(images > 0), rest]))
    seen, rest = bucketing.fill(tokens, others, lengths, sizes)
    batches = [Group(one.tokens, False, one.examples) for one in words]
    batches += [Group(one.tokens, True, one.examples) for one in seen]
    if len(rest):
        longest = int(tokens[rest].max())
        batches.append(Group(next(e for e in lengths if e >= longest), bool((images[rest] > 0).any()), rest))
    order = plan.permutation(seed, window, len(batches)) if batches else []
    return Groups([batches[i] for i in order])


@dataclasses.dataclass(frozen=True)
class GroupedChunk(plan.Chunk):
    """Neighbouring rows of one batch, of which the last ones may be empty.

    Attributes:
        count: how many rows.
        tokens, with_images: what the rows of the whole batch are.
        after: where the next step begins; told by the last chunk of a batch, None from others.
    """

    count: int
    tokens: int
    with_images: bool
    after: Place | None

    @property
    def rows(self) -> slice:
        """The rows of the host's part of the batch that it fills."""
        return slice(self.start, self.start + self.count)


@dataclasses.dataclass(frozen=True)
class GroupedChunks(plan.ByStep):
    """Random access to the chunks of one host, without end: what `plan.Plan` is where batches are of different shapes.

    Every host groups the same windows and takes its own rows of each batch, so that all have the same shape at a step,
    and the global batch does not depend on how many hosts there are. Can be pickled.

    Attributes:
        order: int64 positions -> int64 examples: see `mixture.Mixture`.
        measure: (positions, examples) -> tokens and images of each, without decoding; a pure function.
        lengths: that rows are padded to.
        batch_size: rows of the global batch.
        rows: those of this host.
        seed: of the order of the batches.
        window: examples grouped together.
        start_step, begin: the first step, and where it begins.
        chunk: rows of a chunk.
    """

    order: Callable[[np.ndarray], np.ndarray]
    measure: Measure
    lengths: tuple[int, ...]
    batch_size: int
    rows: range
    seed: int
    window: int
    start_step: int = 0
    chunk: int = 32
    begin: Place = BEGINNING

    def __post_init__(self):
        """Nothing is grouped yet."""
        object.__setattr__(self, "windows", Windows(self._group, 1, self.begin))

    def _group(self, window: int) -> Groups:
        positions = window * self.window + np.arange(self.window, dtype=np.int64)
        tokens, images = self.measure(positions, self.order(positions))
        return group(tokens, images, self.lengths, self.batch_size, seed=self.seed, window=window)

    def place(self, step: int) -> Place:
        """Where a step begins, to be saved with it."""
        return self.windows.place(step)

    def __getitem__(self, item: int) -> GroupedChunk:
        """Chunk number `item` of this host, counted from `start_step`."""
        step, part, rows = self._where(item)
        ((window, unit, _),) = self.windows.spans(step)
        batch = self.windows[window].batches[unit]
        positions = window * self.window + batch.examples[rows.start : rows.stop]
        return GroupedChunk(
            step,
            part * self.chunk,
            positions,
            self.order(positions),
            len(rows),
            batch.tokens,
            batch.with_images,
            self.place(step + 1) if part + 1 == self.chunks_per_batch else None,
        )
