"""Packed batches by step: windows of the plan that each give another number of rows, laid end to end."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vlmjax.data.packing import Packing, pack
from vlmjax.errors import DataError

_KEPT_WINDOWS = 8  # threads work on a few neighbouring steps
_EMPTY_WINDOWS = 8


class Place(NamedTuple):
    """Where a step begins: at a unit (a row, a batch) of a window. What a run saves to go on at once."""

    step: int
    window: int
    unit: int


BEGINNING = Place(0, 0, 0)


class Windows:
    """Steps over windows that each give a different number of units: every unit once, in order.

    Windows do not depend on each other, only the number of units before them does. That sum is kept as far as the
    run has come, and a run that goes on starts from the saved `Place` instead of adding up the past.
    """

    def __init__(self, make: Callable[[int], Any], per_step: int, start: Place = BEGINNING):
        """`make(w)` gives window w, with `rows` units; it has to be a pure function. `per_step` units a step."""
        self._make, self.per_step, self._start = make, per_step, start
        # Number of the first unit of each window from the starting one on.
        self._firsts = [start.step * per_step - start.unit]
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.RLock()

    def __getitem__(self, window: int) -> Any:
        """Window number `window`, made once while it is in use."""
        with self._lock:
            if window not in self._kept:
                self._kept[window] = self._make(window)
                while len(self._kept) > _KEPT_WINDOWS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(window)
            return self._kept[window]

    def spans(self, step: int, units: range | None = None) -> list[tuple[int, int, int]]:
        """(window, first unit, end) of what makes a step, or of the consecutive `units` of it that a host owns."""
        units = range(self.per_step) if units is None else units
        first, end = step * self.per_step + units.start, step * self.per_step + units.stop
        out = []
        with self._lock:
            window = self._window_of(first)
            while first < end:
                begin = self._first(window)
                stop = min(end, self._first(window + 1))
                if stop > first:
                    out.append((window, first - begin, stop - begin))
                first, window = max(first, stop), window + 1
        return out

    def place(self, step: int) -> Place:
        """Where a step begins."""
        window, unit, _ = self.spans(step, range(1))[0]
        return Place(step, window, unit)

    def _first(self, window: int) -> int:
        """Number of the first unit of a window, counted from the beginning of the run."""
        while window - self._start.window >= len(self._firsts):
            last = self._start.window + len(self._firsts) - 1
            self._firsts.append(self._firsts[-1] + self[last].rows)
            if len(self._firsts) > _EMPTY_WINDOWS and self._firsts[-1] == self._firsts[-1 - _EMPTY_WINDOWS]:
                raise DataError(
                    f"nothing in {_EMPTY_WINDOWS} windows on end, up to window {last}, can be packed: every example "
                    "has no tokens or is too long; raise the capacity, or use too_long='truncate'"
                )
        return self._firsts[window - self._start.window]

    def _window_of(self, unit: int) -> int:
        if unit < self._firsts[0]:  # before the place this began from: add up from the beginning
            self._start, self._firsts = BEGINNING, [0]
        while self._firsts[-1] <= unit:
            self._first(self._start.window + len(self._firsts))
        return self._start.window + int(np.searchsorted(self._firsts, unit, side="right")) - 1


class PackedRows(NamedTuple):
    """The examples of some rows of a batch: global position, row from 0, first token there, tokens, number in row."""

    position: np.ndarray
    row: np.ndarray
    start: np.ndarray
    length: np.ndarray
    segment: np.ndarray


class PackedPlan:
    """Packed batches as a function of (seed, step): rows of windows of the underlying plan.

    Window w packs the examples at the global positions w * window to (w + 1) * window - 1, whatever stands there,
    so each position is in exactly one row and each epoch shows every example once. A step takes the next `batch_rows`
    rows, across windows; a host takes consecutive ones of them.
    """

    def __init__(
        self,
        lengths: Callable[[np.ndarray], np.ndarray],
        capacity: int,
        batch_rows: int,
        *,
        window: int = 4096,
        seed: int = 0,
        too_long: str = "truncate",
        counts: Callable[[np.ndarray], np.ndarray] | None = None,
        max_count: int | None = None,
        start: Place = BEGINNING,
    ):
        """Nothing is packed yet.

        Args:
            lengths: tokens of the examples at global positions, int64 [n] -> int [n]; without decoding them.
            capacity: tokens of a row.
            batch_rows: rows of the global batch.
            window: examples packed together.
            seed, too_long, counts, max_count: see `packing.pack`; `counts` by global positions.
            start: the saved place of a run that goes on.
        """
        self.capacity, self.batch_rows, self.window = capacity, batch_rows, window
        self._lengths, self._counts = lengths, counts
        self._options = {"too_long": too_long, "max_count": max_count, "seed": seed}
        self.windows = Windows(self._pack, batch_rows, start)

    def _pack(self, window: int) -> Packing:
        positions = window * self.window + np.arange(self.window, dtype=np.int64)
        counts = self._counts(positions) if self._counts else None
        return pack(self._lengths(positions), self.capacity, counts=counts, window=window, **self._options)

    def rows(self, step: int, rows: range | None = None) -> PackedRows:
        """What is in the rows of a step, or in those that a host owns, in order."""
        parts, done = [], 0
        for window, first, end in self.windows.spans(step, rows):
            packing = self.windows[window]
            here = slice(int(packing.offsets[first]), int(packing.offsets[end]))
            row = packing.row[here]
            segment = np.arange(here.start, here.stop) - packing.offsets[row] + 1
            position = window * self.window + packing.example[here]
            parts.append((position, row - first + done, packing.start[here], packing.length[here], segment))
            done += end - first
        return PackedRows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def place(self, step: int) -> Place:
        """Where a step begins, to be saved with it."""
        return self.windows.place(step)
