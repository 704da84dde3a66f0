"""What a run is doing: every second since its process began belongs to exactly one phase."""

import threading
import time
from collections.abc import Callable

PHASES = ("initialise", "compile", "restore", "step", "data", "evaluate", "checkpoint", "finish")


class Phases:
    """The phase a run is in, since when, and the seconds spent in each.

    Entering one is a sign of life, also when it is the same as before: the watchdog waits for the next. `step` is the
    host's wait for a step that was started, `data` its wait for a batch (the device may still be at work then).
    """

    def __init__(self, began: float | None = None, clock: Callable[[], float] = time.monotonic):
        """In phase `initialise`, since `began` on the clock (now)."""
        self._clock, self._lock = clock, threading.Lock()
        self._name, self._since = "initialise", clock() if began is None else began
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def enter(self, name: str) -> None:
        """Begin a phase, which ends the one before."""
        if name not in PHASES:
            raise ValueError(f"no phase {name!r}: one of {', '.join(PHASES)}")
        with self._lock:
            now = self._clock()
            self._seconds[self._name] += now - self._since
            self._name, self._since = name, now

    def now(self) -> tuple[str, float]:
        """The phase, and for how many seconds it has gone on without a sign of life."""
        with self._lock:
            return self._name, self._clock() - self._since

    def seconds(self) -> dict[str, float]:
        """Seconds in each phase up to now."""
        with self._lock:
            spent = dict(self._seconds)
            spent[self._name] += self._clock() - self._since
            return spent
