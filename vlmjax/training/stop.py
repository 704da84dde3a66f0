"""Stopping in good order: the first SIGTERM or Ctrl-C lets the step end and be saved, the second ends at once."""

import signal
import threading
from types import FrameType
from typing import Any

import jax

from vlmjax.errors import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Listens for the two signals while it is open, in a process that is alone.

    Processes of one run have to stop at the same step, which they cannot agree on by signals; there, and outside the
    main thread, the signals keep their usual effect.

    Attributes:
        number: the signal that came, None as long as none did.
    """

    def __init__(self):
        """Begin to listen."""
        self.number: int | None = None
        self._before: dict[int, Any] = {}
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._asked) for number in _SIGNALS}

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.close()  # whoever asks twice does not want to wait
        print("\nstopping after this step; once more to stop at once", flush=True)

    def raise_at(self, step: int) -> None:
        """End the run, whose state after `step` is saved. Raises Stopped."""
        raise Stopped(
            f"stopped at step {step}, which is saved: the same command continues from there", self.number
        )

    def close(self) -> None:
        """Give the signals their former effect back."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
