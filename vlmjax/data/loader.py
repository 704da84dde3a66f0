"""The machine under the pipeline: chunks of a plan through grain's threads into batches, failures counted."""

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from vlmjax.data import images, plan
from vlmjax.data.record import Record
from vlmjax.data.sources import Source, key_of
from vlmjax.errors import BadRecord, DataError

Batch = dict[str, np.ndarray]

_log = logging.getLogger(__name__)
_MIN_SEEN = 400  # records before a share of bad ones means anything


class Failure(NamedTuple):
    """A record that could not be used: why, which, and the details for the log."""

    reason: str
    key: str
    detail: str


class SkipCounter:
    """Counts records that could not be used, logs some of them, and stops the run when they are too many.

    Attributes:
        seen: records asked for.
        by_reason: how many were skipped, for each reason.
    """

    def __init__(self, name: str, max_share: float):
        """`max_share` of all records may be bad.

        Judged from some hundred records on and beyond what chance explains, or when all are bad.
        """
        self.name, self.max_share = name, max_share
        self.seen, self.by_reason = 0, Counter()

    @property
    def skipped(self) -> int:
        """All bad records so far."""
        return sum(self.by_reason.values())

    def add(self, seen: int, failures: list[Failure]) -> None:
        """Count the records of one batch. Raises DataError above the share."""
        self.seen += seen
        for failure in failures:
            self.by_reason[failure.reason] += 1
            self._report(failure, self.by_reason[failure.reason])
        allowed = self.max_share * self.seen
        # Three standard deviations of a count about `allowed`: good data must not stop on a bad day.
        too_many = self.seen >= _MIN_SEEN and self.skipped > allowed + 3 * math.sqrt(allowed)
        if too_many or (failures and self.skipped == self.seen and self.max_share < 1):
            raise DataError(
                f"{self.name}: {self.skipped} of {self.seen} records are unusable ({self.summary()}), more than "
                f"the {self.max_share:.1%} allowed; last: {failures[-1].key} {failures[-1].detail}; "
                "mend the data or raise data.max_bad_share"
            )

    def summary(self) -> str:
        """'truncated 12, no_caption 3': for messages and reports."""
        return ", ".join(f"{reason} {count}" for reason, count in self.by_reason.most_common())

    def _report(self, failure: Failure, count: int) -> None:
        """Log the first five of a reason, then the 8th, 16th, 32nd, ..."""
        if count <= 5 or count & (count - 1) == 0:
            where = f"number {count} of this reason in {self.name}"
            _log.warning("skipped %s: %s (%s), %s", failure.key, failure.reason, failure.detail, where)


class Pixels:
    """Decoded images by index, kept in memory while there is room.

    With `shortest`, images are scaled down to that shorter side before anything else, kept or not, so what a
    run sees does not depend on what happened to be in memory.
    """

    def __init__(self, shortest: int | None, limit_bytes: int, decode: Callable[[Any], np.ndarray]):
        """`shortest` None keeps nothing and scales nothing."""
        self._shortest, self._limit, self._decode = shortest, limit_bytes, decode
        self._kept: dict[int, tuple[np.ndarray, Record]] = {}
        self._bytes, self._lock = 0, threading.Lock()

    def __call__(self, source: Source, i: int) -> tuple[np.ndarray, Record]:
        """Pixels of example i and its record. Raises BadRecord."""
        known = self._kept.get(i)
        if known is not None:
            return known
        record = source[i]
        try:
            pixels = self._decode(record.image)
        except BadRecord as error:
            raise BadRecord(error.reason, record.key, error.detail) from error
        if self._shortest is None:
            return pixels, record
        pixels = images.shrink(pixels, self._shortest)
        record = Record(record.key, b"", record.captions)
        with self._lock:
            if self._bytes + pixels.nbytes <= self._limit:
                self._bytes += pixels.nbytes
                self._kept[i] = pixels, record
        return pixels, record


def guarded(source: Source, index: int, read: Callable[[], Any]) -> Any:
    """The result of `read`, or a Failure: an exception would make grain lose its place or end early."""
    try:
        return read()
    except BadRecord as error:
        return Failure(error.reason, error.key or _key(source, index), error.detail)
    except (
        Exception
    ) as error:  # a mistake in a source or transform is counted too, and stops the run by its share
        _log.debug("example %d of %s", index, source.name, exc_info=True)
        return Failure(f"error_{type(error).__name__}", _key(source, index), str(error)[:200])


def _key(source: Source, index: int) -> str:
    try:
        return key_of(source, index)
    except Exception:  # this is already the report of a failure
        return f"example {index}"


class _Buffers:
    """One preallocated batch per step in flight, which the chunks of that step fill side by side."""

    def __init__(self, make: Callable[[], Batch]):
        self._make, self._lock = make, threading.Lock()
        self._open: dict[int, Batch] = {}

    def of(self, step: int) -> Batch:
        with self._lock:
            if step not in self._open:
                self._open[step] = self._make()
            return self._open[step]

    def take(self, step: int) -> Batch:
        with self._lock:
            return self._open.pop(step)


def load(
    chunks: plan.Plan,
    make: Callable[[], Batch],
    work: Callable[[plan.Chunk, Batch], list[Failure]],
    threads: int,
) -> Iterator[tuple[int, Batch, list[Failure]]]:
    """Run `work` on every chunk, some ahead of their turn, and give (step, batch, failures) in order.

    Args:
        chunks: the plan; its chunks of one step fill one batch.
        make: makes an empty batch of this host's rows.
        work: fills the rows of its chunk (views into the batch) and returns what failed; must not raise.
        threads: that work; 0 for the caller's own.
    """
    import grain  # its import takes a second

    buffers = _Buffers(make)

    def run(chunk: plan.Chunk) -> tuple[int, list[Failure]]:
        batch = buffers.of(chunk.step)
        rows = slice(chunk.start, chunk.start + len(chunk.indices))
        return chunk.step, work(chunk, {name: value[rows] for name, value in batch.items()})

    per_batch = chunks.chunks_per_batch
    ahead = 2 * per_batch + threads if threads else 0
    dataset = grain.MapDataset.source(chunks).map(run)
    done = iter(dataset.to_iter_dataset(grain.ReadOptions(threads, ahead)))
    failures: list[Failure] = []
    try:
        for count, (step, failed) in enumerate(done, 1):
            failures += failed
            if count % per_batch == 0:
                yield step, buffers.take(step), failures
                failures = []
    finally:
        done.close()
