"""Several examples in one row of tokens: packed by length before anything is decoded, the same on every host."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmjax.data import plan
from vlmjax.errors import DataError


class Packing(NamedTuple):
    """Where the examples of one window went, sorted by row and start.

    Attributes:
        example: number of each placed example inside its window, int64.
        row, start, length: its row, its first token there, and its tokens after truncation, int64.
        offsets: row r holds the entries offsets[r] to offsets[r + 1], int64 [rows + 1].
        truncated: examples that were longer than a row and lost their end.
        dropped: examples that are in no row: of no length, or too long under `too_long="drop"`.
    """

    example: np.ndarray
    row: np.ndarray
    start: np.ndarray
    length: np.ndarray
    offsets: np.ndarray
    truncated: np.ndarray
    dropped: np.ndarray

    @property
    def rows(self) -> int:
        """How many rows there are; none of them is empty."""
        return len(self.offsets) - 1


def pack(
    lengths: np.ndarray,
    capacity: int,
    *,
    too_long: str = "truncate",
    counts: np.ndarray | None = None,
    max_count: int | None = None,
    seed: int = 0,
    window: int = 0,
) -> Packing:
    """Put examples into as few rows as best fit finds: longest first, each where it leaves the least room.

    Every example is in exactly one row or in `dropped`. Rows come in an order shuffled by (seed, window), since
    best fit fills rows of long examples first; inside a row examples keep their order. A pure function.

    Args:
        lengths: tokens of each example, int [n]; 0 marks an example known to be useless.
        capacity: tokens of a row.
        too_long: what is done with examples above the capacity: "truncate" cuts their end, "drop" leaves them out,
            "error" stops.
        counts: how much of a second bounded thing each example has (images, say); 1 each by default.
        max_count: the bound of that in a row, where its arrays have a fixed size; None for no bound.
        seed, window: of the order of the rows.

    Raises:
        DataError: a negative length, an example above `max_count` alone, or too long under "error".
    """
    if too_long not in ("truncate", "drop", "error"):
        raise DataError(f"too_long={too_long!r} is not 'truncate', 'drop' or 'error'")
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and lengths.min() < 0:
        raise DataError(f"example {int(lengths.argmin())} has a length of {int(lengths.min())} tokens")
    above = lengths > capacity
    if too_long == "error" and above.any():
        worst = int(lengths.argmax())
        raise DataError(f"example {worst} has {int(lengths[worst])} tokens, a row has room for {capacity}")
    left_out = (lengths == 0) | (above & (too_long == "drop"))
    tokens = np.minimum(lengths, capacity)
    placed = np.flatnonzero(~left_out)
    order = placed[np.argsort(-tokens[placed], kind="stable")]
    many = None if max_count is None else _checked_counts(counts, order, len(lengths), max_count)
    row = _best_fit(tokens[order].tolist(), capacity, many, max_count or 0)
    rows = int(row.max(initial=-1)) + 1
    if rows:
        row = plan.permutation(seed, window, rows)[row]
    by_row = np.lexsort((order, row))
    example, row = order[by_row], row[by_row]
    length = tokens[example]
    offsets = np.searchsorted(row, np.arange(rows + 1))
    before = np.cumsum(length) - length
    start = before - before[offsets[:-1]][row] if rows else before
    return Packing(
        example, row, start, length, offsets, np.flatnonzero(above & ~left_out), np.flatnonzero(left_out)
    )


def _checked_counts(counts: np.ndarray | None, order: np.ndarray, n: int, most: int) -> list[int]:
    found = np.ones(n, np.int64) if counts is None else np.asarray(counts, np.int64)
    if len(order) and found[order].max() > most:
        worst = int(order[found[order].argmax()])
        raise DataError(f"example {worst} counts {int(found[worst])}, a row has room for {most}")
    return found[order].tolist()


def _best_fit(tokens: list[int], capacity: int, counts: list[int] | None, most: int) -> np.ndarray:
    """The row of each example, taken in turn: the one with the least room that is enough.

    Bit s of `spaces` is set when some row has room for exactly s more tokens, so the tightest row is found by the
    lowest bit from the example's length on.
    """
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces, rows, used, out = 0, 0, [], []
    for place, length in enumerate(tokens):
        found, row, space = spaces >> length, -1, capacity
        while found and row < 0:
            space = length + (found & -found).bit_length() - 1
            row = (
                rows_with[space].pop()
                if counts is None
                else _take(rows_with[space], used, most - counts[place])
            )
            if not rows_with[space]:
                spaces ^= 1 << space
            found &= found - 1
        if row < 0:
            row, rows, space = rows, rows + 1, capacity
            used.append(0)
        out.append(row)
        used[row] += counts[place] if counts else 0
        space -= length
        if space and not (counts and used[row] == most):
            rows_with[space].append(row)
            spaces |= 1 << space
    return np.array(out, np.int64)


def _take(rows: list[int], used: list[int], room: int) -> int:
    """Remove and return a row of which at most `room` is used; -1 when there is none."""
    for place in range(len(rows) - 1, -1, -1):
        if used[rows[place]] <= room:
            return rows.pop(place)
    return -1


def empty_rows(rows: int, capacity: int, pad: int) -> dict[str, np.ndarray]:
    """A packed batch without examples: see `lay`."""
    return {
        "input_ids": np.full((rows, capacity), pad, np.int32),
        "segment_ids": np.zeros((rows, capacity), np.int32),
        "position_ids": np.zeros((rows, capacity), np.int32),
        "loss_weights": np.zeros((rows, capacity), np.float32),
    }


def lay(
    out: dict[str, np.ndarray],
    row: int,
    start: int,
    length: int,
    segment: int,
    ids: Sequence[int] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
) -> int:
    """Write one example into its place of a packed batch.

    `segment_ids` are `segment` on its tokens (0 where nothing is), `position_ids` begin at 0. `loss_weights` belong
    to tokens as targets: `weights`, or 1, and always 0 on the first token, which nothing of its own segment precedes.
    A record that cannot be used is left out, and its place stays empty.

    Args:
        out: from `empty_rows`.
        row, start, length, segment: from `windows.PackedPlan.rows`.
        ids: its tokens; those beyond `length` are cut.
        weights: of each token as a target.

    Returns:
        how many tokens were cut.
    """
    kept = min(len(ids), length)
    span = slice(start, start + kept)
    out["input_ids"][row, span] = ids[:kept]
    out["segment_ids"][row, span] = segment
    out["position_ids"][row, span] = np.arange(kept)
    out["loss_weights"][row, span] = 1.0 if weights is None else weights[:kept]
    out["loss_weights"][row, start] = 0.0
    return len(ids) - kept
