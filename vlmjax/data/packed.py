"""Packed rows as work: which examples go where in the rows of a step, measured a window at a time, undecoded."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from vlmjax.data import plan
from vlmjax.data.windows import BEGINNING, PackedPlan, Place

Measure = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class PackedChunk(plan.Chunk):
    """Neighbouring rows of one batch that hold several examples each.

    Attributes:
        count: how many rows.
        row, first, length, segment: of each example: its row in the chunk, where it begins there, the tokens it has
            room for, and its number in the row, from 1.
        after: where the next step begins; told by the last chunk of a batch, None from others.
    """

    count: int
    row: np.ndarray
    first: np.ndarray
    length: np.ndarray
    segment: np.ndarray
    after: Place | None

    @property
    def rows(self) -> slice:
        """The rows of the host's part of the batch that it fills."""
        return slice(self.start, self.start + self.count)


@dataclasses.dataclass(frozen=True)
class PackedChunks(plan.ByStep):
    """Random access to the packed chunks of one host, without end: what `plan.Plan` is where a row is an example.

    Every host packs the same windows and takes its own rows of them, so the global batch does not depend on how many
    hosts there are. Can be pickled; another process packs for itself.

    Attributes:
        order: int64 positions -> int64 examples: see `mixture.Mixture`.
        measure: (positions, examples) -> tokens and images of each, without decoding; a pure function.
        capacity: tokens of a row.
        max_count: images of a row.
        batch_size: rows of the global batch.
        rows: those of this host.
        seed: of the order of the rows.
        window: examples packed together.
        start_step, begin: the first step, and where it begins.
        chunk: rows of a chunk.
    """

    order: Callable[[np.ndarray], np.ndarray]
    measure: Measure
    capacity: int
    max_count: int
    batch_size: int
    rows: range
    seed: int
    window: int
    start_step: int = 0
    chunk: int = 32
    begin: Place = BEGINNING

    def __post_init__(self):
        """Nothing is packed yet."""
        # One window is measured at a time (`windows` holds a lock), its lengths and its counts by the same call.
        known: dict[str, Any] = {}

        def measured(positions: np.ndarray, which: int) -> np.ndarray:
            if known.get("first") != int(positions[0]):
                known["values"] = self.measure(positions, self.order(positions))
                known["first"] = int(positions[0])
            return known["values"][which]

        packed = PackedPlan(
            lambda positions: measured(positions, 0),
            self.capacity,
            self.batch_size,
            window=self.window,
            seed=self.seed,
            counts=lambda positions: measured(positions, 1),
            max_count=self.max_count,
            start=self.begin,
        )
        object.__setattr__(self, "packed", packed)

    def place(self, step: int) -> Place:
        """Where a step begins, to be saved with it."""
        return self.packed.place(step)

    def __getitem__(self, item: int) -> PackedChunk:
        """Chunk number `item` of this host, counted from `start_step`."""
        step, part, rows = self._where(item)
        placed = self.packed.rows(step, rows)
        return PackedChunk(
            step,
            part * self.chunk,
            placed.position,
            self.order(placed.position),
            len(rows),
            placed.row,
            placed.start,
            placed.length,
            placed.segment,
            self.place(step + 1) if part + 1 == self.chunks_per_batch else None,
        )
