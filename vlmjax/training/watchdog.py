"""Ends a process that is stuck: XLA waits for ever for a peer that is alive and does not come."""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable

from vlmjax.errors import STUCK
from vlmjax.training.phases import Phases

# Only these end often; compiling, evaluating, restoring and saving take as long as they take.
_QUICK = ("step", "data")
_LONGER = 10


class Watchdog:
    """A thread that dumps all stacks and exits with 76 when no step or batch has come for so many seconds.

    Phases that are no steps have ten times as long. A limit of 0 watches nothing.
    """

    def __init__(self, phases: Phases, seconds: float | int, leave: Callable[[int], None] = os._exit):
        """Begin to watch; `leave` ends the process."""
        self._phases, self._limit, self._leave = phases, seconds, leave
        self._closed = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def limit(self, phase: str) -> float | int:
        """Seconds that a phase may go on without a sign of life."""
        return self._limit * (1 if phase in _QUICK else _LONGER)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._limit / 4)):
            phase, seconds = self._phases.now()
            if seconds > self.limit(phase):
                print(
                    f"error: stuck in phase {phase!r} for {seconds:.0f} s, more than config.watchdog={self._limit:g} "
                    f"allows ({self.limit(phase):g} s); the stacks of all threads follow",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                self._leave(STUCK)
                return

    def __enter__(self) -> "Watchdog":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Watch no longer."""
        self._closed.set()
