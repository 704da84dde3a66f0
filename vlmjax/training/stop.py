"""Stopping in good order: after a SIGTERM or Ctrl-C all processes agree on one step, save it and leave."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from vlmjax.errors import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Listens for the two signals while it is open, and says after which step to stop.

    Alone, the first signal lets the step end and be saved, the second ends the process at once. Processes of one run
    have to stop after the same step: there jax's preemption service takes SIGTERM (and a cloud's notice) from whichever
    process got it and chooses the step; Ctrl-C is passed on to it. Outside the main thread signals keep their effect.

    Attributes:
        number: the signal that came, None as long as none did.
    """

    def __init__(self):
        """Begin to listen."""
        self.number: int | None = None
        self._before: dict[int, Any] = {}
        self._alone = jax.process_count() == 1
        if threading.current_thread() is threading.main_thread():
            # A handler of ours for SIGTERM would silently switch jax's service off.
            signals = _SIGNALS if self._alone else (signal.SIGINT,)
            self._before = {number: signal.signal(number, self._asked) for number in signals}

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.close()  # whoever asks twice does not want to wait
        if self._alone:
            self.number = number
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        print("\nstopping after this step; once more to stop at once", flush=True)

    def after(self, step: int) -> bool:
        """Whether the run ends after this step; every process asks once for every step, and all get one answer."""
        if not self._alone and multihost_utils.reached_preemption_sync_point(step):
            self.number = signal.SIGTERM
        return self.number is not None

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
