"""The machine under the pipeline: chunks of a plan through grain's threads into batches, failures counted."""

import dataclasses
import logging
import math
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from vlmjax.data import grouped, images, packed, plan, windows, workers
from vlmjax.data.record import Record
from vlmjax.data.sources import Source, key_of
from vlmjax.errors import BadRecord, DataError

Batch = dict[str, np.ndarray]

_log = logging.getLogger(__name__)
_MIN_SEEN = 400  # records before a share of bad ones means anything
_SHOWN = 3  # records of a reason that are logged by their keys
_ALL_BAD = 8  # records that say by themselves that nothing in the data can be used


class Failure(NamedTuple):
    """A record that could not be used: why, which, the details for the log, and the source it is of."""

    reason: str
    key: str
    detail: str
    source: str = ""


class SkipCounter:
    """Counts records that could not be used, logs some of them, and stops the run when they are too many.

    Attributes:
        seen: records asked for.
        by_reason: how many were skipped, for each reason.
        by_source: how many were skipped, for each source.
    """

    def __init__(self, name: str, max_share: float):
        """`max_share` of all records may be bad.

        Judged from some hundred records on and beyond what chance explains, or when all of the first are bad.
        """
        self.name, self.max_share = name, max_share
        self.seen, self.by_reason, self.by_source = 0, Counter(), Counter()
        self._shown: dict[str, set[str]] = {}
        self._unshown: Counter[str] = Counter()

    @property
    def skipped(self) -> int:
        """All bad records so far."""
        return sum(self.by_reason.values())

    def add(self, seen: int, failures: list[Failure]) -> None:
        """Count the records of one batch. Raises DataError above the share."""
        self.seen += seen
        for failure in failures:
            self.by_reason[failure.reason] += 1
            self.by_source[failure.source or self.name] += 1
            self._show(failure)
        allowed = self.max_share * self.seen
        # Three standard deviations of a count about `allowed`: good data must not stop on a bad day.
        too_many = self.seen >= _MIN_SEEN and self.skipped > allowed + 3 * math.sqrt(allowed)
        all_bad = self.skipped == self.seen >= _ALL_BAD and self.max_share < 1
        if too_many or all_bad:
            raise DataError(
                f"{self.name}: {self.skipped} of {self.seen} records are unusable ({self.summary()}), more than "
                f"the {self.max_share:.1%} allowed; last: {failures[-1].key} {failures[-1].detail}; "
                "mend the data or raise data.max_bad_share"
            )

    def summary(self) -> str:
        """'truncated 12, no_caption 3': for messages and reports."""
        return ", ".join(f"{reason} {count}" for reason, count in self.by_reason.most_common())

    def _show(self, failure: Failure) -> None:
        """Log a record of its own, the first few of each reason; the others wait for `report`."""
        shown = self._shown.setdefault(failure.reason, set())
        if len(shown) >= _SHOWN or failure.key in shown:
            self._unshown[failure.reason] += 1
            return
        shown.add(failure.key)
        rest = "; more of this reason are only counted" if len(shown) == _SHOWN else ""
        where = failure.source or self.name
        _log.warning("skipped %s: %s (%s), in %s%s", failure.key, failure.reason, failure.detail, where, rest)

    def report(self) -> None:
        """Log in one line how many more were skipped since the last report; called once per logging interval."""
        if self._unshown:
            more = ", ".join(f"{reason} {count}" for reason, count in self._unshown.most_common())
            _log.warning("skipped more: %s; %d of %d records so far", more, self.skipped, self.seen)
            self._unshown.clear()


class Pixels:
    """Decoded images by index, kept in memory while there is room.

    With `shortest`, images are scaled down to that shorter side before anything else, kept or not, so what a
    run sees does not depend on what happened to be in memory.
    """

    def __init__(self, shortest: int | None, limit_bytes: int, decode: Callable[[Any], Any]):
        """`shortest` None keeps nothing and scales nothing."""
        self._shortest, self._limit, self._decode = shortest, limit_bytes, decode
        self._kept: dict[int, tuple[np.ndarray, Record]] = {}
        self._bytes, self._lock = 0, threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """A worker process begins with nothing kept."""
        return {"shortest": self._shortest, "limit_bytes": self._limit, "decode": self._decode}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From `__getstate__`."""
        self.__init__(**state)

    def __call__(self, source: Source, i: int) -> tuple[np.ndarray | images.Jpeg, Record, int]:
        """Pixels of example i, its record, and the encoded bytes read for it. Raises BadRecord."""
        known = self._kept.get(i)
        if known is not None:
            return *known, 0
        record = source[i]
        size = len(record.image) if isinstance(record.image, bytes) else 0
        try:
            pixels = self._decode(record.image)
        except BadRecord as error:
            raise BadRecord(error.reason, record.key, error.detail) from error
        if self._shortest is None:
            return pixels, record, size
        pixels = images.shrink(pixels, self._shortest)
        record = dataclasses.replace(record, image=b"")
        with self._lock:
            if self._bytes + pixels.nbytes <= self._limit:
                self._bytes += pixels.nbytes
                self._kept[i] = pixels, record
        return pixels, record, size


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


class Done(NamedTuple):
    """What came of one chunk or one batch.

    Attributes:
        failures: records that could not be used.
        records: all that were asked for.
        seconds: of all threads.
        bytes_read: of encoded images.
        truncated: texts that were cut.
        after: where the next step begins, of a packed plan.
    """

    failures: list[Failure]
    records: int
    seconds: float
    bytes_read: int
    truncated: int
    after: windows.Place | None = None


class _Buffers:
    """One preallocated batch per step in flight, which the chunks of that step fill side by side."""

    def __init__(self, make: Callable[[plan.Chunk], Batch]):
        self._make, self._lock = make, threading.Lock()
        self._open: dict[int, Batch] = {}

    def of(self, chunk: plan.Chunk) -> Batch:
        with self._lock:
            if chunk.step not in self._open:
                self._open[chunk.step] = self._make(chunk)
            return self._open[chunk.step]

    def take(self, step: int) -> Batch:
        with self._lock:
            return self._open.pop(step)


class Batches:
    """The batches of a plan in order, worked on ahead of their turn: an iterator of (step, batch, Done)."""

    def __init__(
        self,
        chunks: plan.Plan | packed.PackedChunks | grouped.GroupedChunks,
        make: Callable[[plan.Chunk], Batch],
        work: Callable[[plan.Chunk, Batch], Done],
        threads: int,
        processes: int = 0,
    ):
        """Nothing runs before the first batch is asked for.

        Args:
            chunks: the plan; its chunks of one step fill one batch.
            make: makes an empty batch of this host's rows, of the shape that its chunks say.
            work: fills the rows of its chunk (views into the batch); must not raise.
            threads: that work; 0 for the caller's own.
            processes: that work instead, each with its part of the threads; `make` and `work` are pickled.
        """
        self._finished = self._taken = 0  # chunks, or in processes whole batches
        self._lock = threading.Lock()
        self._elsewhere: workers.Finished | None = None
        steps = self._in_processes if processes else self._in_threads
        self._steps = steps(chunks, make, work, threads, processes)
        self._per_batch = 1 if processes else chunks.chunks_per_batch

    def __iter__(self) -> "Batches":
        """Itself."""
        return self

    def __next__(self) -> tuple[int, Batch, Done]:
        """The next batch in order."""
        return next(self._steps)

    def waiting(self) -> float:
        """How many batches are done and not yet taken."""
        if self._elsewhere is not None:
            self._finished = self._elsewhere.total()
        return max(0, self._finished - self._taken) / self._per_batch

    def close(self) -> None:
        """Stop working ahead."""
        self._steps.close()

    def _in_threads(self, chunks, make, work, threads, _) -> Iterator[tuple[int, Batch, Done]]:
        import grain  # its import takes a second

        buffers, per_batch = _Buffers(make), chunks.chunks_per_batch

        def run(chunk: plan.Chunk) -> tuple[int, Done]:
            batch = buffers.of(chunk)
            done = work(chunk, {name: value[chunk.rows] for name, value in batch.items()})
            with self._lock:
                self._finished += 1
            return chunk.step, done

        ahead = 2 * per_batch + threads if threads else 0
        dataset = grain.MapDataset.source(chunks).map(run)
        results = iter(dataset.to_iter_dataset(grain.ReadOptions(threads, ahead)))
        parts: list[Done] = []
        try:
            for step, done in results:
                self._taken += 1
                parts.append(done)
                if len(parts) == per_batch:
                    yield step, buffers.take(step), _sum(parts)
                    parts = []
        finally:
            results.close()

    def _in_processes(self, chunks, make, work, threads, processes) -> Iterator[tuple[int, Batch, Done]]:
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads its flags, which a notebook never parses
        whole = dataclasses.replace(chunks, chunk=len(chunks.rows))
        each = max(1, threads // processes)
        workers.start_tracker()
        self._elsewhere = finished = workers.Finished(processes)
        dataset = grain.MapDataset.source(whole).map(workers.WholeBatch(make, work, finished.path))
        dataset = dataset.to_iter_dataset(grain.ReadOptions(each, 2 * each))
        options = grain.MultiprocessingOptions(processes, per_worker_buffer_size=2)
        results = iter(dataset.mp_prefetch(options, worker_init_fn=workers.init))
        try:
            while True:
                try:
                    numbers, words = next(results)
                except RuntimeError as error:
                    raise DataError(
                        f"a data process ended by itself ({error}); often memory ran out: lower data.processes or "
                        "data.threads, or look into the system's log"
                    ) from error
                step, keys, done = pickle.loads(words)
                # A copy: a batch in shared memory would keep its segment for as long as anybody holds an array.
                batch = {name: np.array(value) for name, value in numbers.items()}
                self._taken += 1
                yield step, {**batch, "key": np.array(keys, object)}, done
        finally:
            results.close()
            self._elsewhere = None
            finished.close()


def _sum(parts: list[Done]) -> Done:
    failures = [failure for part in parts for failure in part.failures]
    records, seconds, read, truncated = (
        sum(getattr(part, name) for part in parts)
        for name in ("records", "seconds", "bytes_read", "truncated")
    )
    return Done(failures, records, seconds, read, truncated, parts[-1].after)
