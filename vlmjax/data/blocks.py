"""The order of one source's epochs: shuffled as a whole, or in blocks where reading at random is dear."""

import zlib

import numpy as np

from vlmjax.data import plan

_BLOCKS = 0x626C6F636B  # keeps the draws of blocks apart from those of examples
WINDOW = 16  # blocks shuffled into each other at a time


class Order:
    """A source's endless order: `order(turns) -> indices`, each run of `size` turns a permutation of its own.

    With `ends`, neighbours come from few blocks (shards, row groups), so that few have to be at hand: blocks are
    permuted, taken `window` at a time, and the examples of one window are permuted as one set.
    """

    def __init__(self, size: int, seed: int, ends: np.ndarray | None = None, window: int = WINDOW):
        """`ends` int64 [blocks]: where each block ends, ascending to `size`; None shuffles the whole."""
        self.size, self.seed, self.window = size, seed, window
        self._ends = None if ends is None or len(ends) <= window else np.asarray(ends, np.int64)
        self._layouts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    @property
    def layout(self) -> int:
        """A number of the blocks, 0 without: runs of one source agree in their order only where it is the same."""
        return 0 if self._ends is None else zlib.crc32(self._ends.astype("<i8").tobytes())

    def __call__(self, turns: np.ndarray) -> np.ndarray:
        """The example of each turn (int64 [n], from 0): int64 [n] in [0, size)."""
        epochs, places = np.divmod(np.asarray(turns, np.int64), self.size)
        out = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            out[here] = self._epoch(places[here], epoch)
        return out

    def _epoch(self, places: np.ndarray, epoch: int) -> np.ndarray:
        if self._ends is None:
            return plan.permute(places, self.size, self.seed, epoch)
        starts, moved_ends, window_ends = self._layout(epoch)
        windows, out = np.searchsorted(window_ends, places, side="right"), np.empty_like(places)
        for window in np.unique(windows).tolist():
            here = windows == window
            first = int(window_ends[window - 1]) if window else 0
            count = int(window_ends[window]) - first
            out[here] = first + plan.permute(
                places[here] - first, count, plan.mix64(self.seed, window), epoch
            )
        block = np.searchsorted(moved_ends, out, side="right")
        return starts[block] + out - np.where(block, moved_ends[block - 1], 0)

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the blocks in this epoch's order: where each starts in the source and ends in the epoch; window ends."""
        known = self._layouts.get(epoch)
        if known is None:
            starts = np.concatenate([[0], self._ends[:-1]])
            order = plan.permutation(plan.mix64(self.seed, _BLOCKS), epoch, len(starts))
            moved_ends = np.cumsum((self._ends - starts)[order])
            last = np.arange(self.window, len(order) + self.window, self.window).clip(max=len(order)) - 1
            known = starts[order], moved_ends, moved_ends[last]
            # The epochs that are under way, no others: a new dict, since threads may be reading the old one.
            kept = {e: v for e, v in self._layouts.items() if abs(e - epoch) <= 1}
            self._layouts = {**kept, epoch: known}
        return known
