"""Processes that decode: how they start, tell how far they are, and end with the trainer however that ends."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import struct
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from typing import Any

from vlmjax.data import plan

_COUNT = struct.Struct("<Q")
_LOCK = threading.Lock()
_index = 0  # of this process among the workers


class Finished:
    """How many batches each process has finished, in a small file that all of them write to.

    Grain's queues belong to it alone, and what could be shared by inheritance does not go through its pickling.
    """

    def __init__(self, processes: int):
        """Make the file; it goes with `close`."""
        self._file, self._size = (
            tempfile.NamedTemporaryFile(prefix="vlmjax-finished-"),
            processes * _COUNT.size,
        )
        self._file.truncate(self._size)
        self.path = self._file.name

    def total(self) -> int:
        """Of all processes together."""
        return sum(count for (count,) in _COUNT.iter_unpack(os.pread(self._file.fileno(), self._size, 0)))

    def close(self) -> None:
        """Remove the file."""
        self._file.close()


class WholeBatch:
    """One item of a worker process: a batch of this host, numbers apart from what has to be pickled."""

    def __init__(
        self, make: Callable[[plan.Chunk], Any], work: Callable[[plan.Chunk, Any], Any], finished: str
    ):
        """`finished` is the path of a `Finished`."""
        self._make, self._work, self._path = make, work, finished
        self._file, self._count = -1, 0

    def __call__(self, chunk: plan.Chunk) -> tuple[Any, bytes]:
        """The arrays of the chunk's batch, and its step, keys and report, pickled."""
        batch = self._make(chunk)
        done = self._work(chunk, batch)
        keys = batch.pop("key").tolist()
        self._note()
        return batch, pickle.dumps((chunk.step, keys, done))

    def _note(self) -> None:
        with _LOCK:
            if self._file < 0:
                self._file = os.open(self._path, os.O_WRONLY)
            self._count += 1
            os.pwrite(self._file, _COUNT.pack(self._count), _index * _COUNT.size)


def init(index: int = 0, _count: int = 1) -> None:
    """Keep a worker off the accelerator, and end it with its parent, even a killed one.

    A worker that outlived its parent would hold the tracker of shared memory open, which frees what is left when
    the last process of the family is gone.
    """
    global _index
    _index = index
    os.environ["JAX_PLATFORMS"] = "cpu"
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def start_tracker() -> None:
    """Start the tracker of shared memory, before any worker, deaf to SIGHUP.

    A terminal that closes sends that signal to all of a run's processes, and the tracker has to outlive the others.
    It ignores SIGINT and SIGTERM by itself. Only the main thread may do this.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGHUP) is None:
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        resource_tracker.ensure_running()
    finally:
        signal.signal(signal.SIGHUP, before)
