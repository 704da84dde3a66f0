"""Spikes of the loss: found against the losses before them, so that a run can go back to where it was well."""

import logging
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from vlmjax.errors import NonFiniteError
from vlmjax.training.workdir import Workdir

# A normal distribution's standard deviation from its median absolute deviation.
_DEVIATION = 1.4826
# Of the median. Losses that hardly vary would make a spike of every ripple.
_LEAST_DEVIATION = 0.01
# Fewer losses than this say nothing about the next one.
_LEAST_LOSSES = 20
_MOST_REWINDS = 10  # in one process; a run that spikes more often needs another recipe
_log = logging.getLogger(__name__)


class Spike(NamedTuple):
    """Losses far above those before them: `losses` of the steps from `first` on, of which `usual` is the median."""

    first: int
    losses: tuple[float, ...]
    usual: float

    @property
    def last(self) -> int:
        """Its last step."""
        return self.first + len(self.losses) - 1


class Spikes:
    """Looks at the loss of every step; equal on all processes of a run, since their losses are.

    A step is high whose loss lies more than `threshold` deviations above the median of the `window` losses that were
    not; the deviation is the median absolute one, which a few outliers do not move. So many high steps in a row as
    `steps` make a spike.

    Attributes:
        pending: one that was found and not yet dealt with.
    """

    def __init__(
        self,
        folder: Workdir,
        settings: Any,
        losses: Sequence[float] = (),
        high: Sequence[float] = (),
        pending: Sequence[Any] | None = None,
    ):
        """`settings` is `recipe.spikes`; the losses go on from a checkpoint's `state`."""
        self._folder, self._settings = folder, settings
        self._losses, self._high = list(losses), list(high)
        self.pending = Spike(pending[0], tuple(pending[1]), pending[2]) if pending else None
        self._rewinds = 0

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a continued run sees the same spikes."""
        pending = list(self.pending) if self.pending else None
        return {"losses": self._losses, "high": self._high, "pending": pending}

    @property
    def suspected(self) -> bool:
        """Whether the last loss was high: what is saved now may be what is wrong."""
        return bool(self._high or self.pending)

    def see(self, step: int, loss: float) -> None:
        """Take note of a step's loss; the spike that it completes is `pending`."""
        if not self._settings.threshold or not math.isfinite(loss):
            return
        if not self._is_high(loss):
            self._losses = [*self._losses, *self._high, loss][-self._settings.window :]
            self._high = []
            return
        self._high.append(loss)
        if len(self._high) < self._settings.steps:
            return
        usual = statistics.median(self._losses)
        self.pending = Spike(step - len(self._high) + 1, tuple(self._high), usual)
        self._losses, self._high = [], []  # whatever comes next, or comes again, is measured anew

    def _is_high(self, loss: float) -> bool:
        if len(self._losses) < min(_LEAST_LOSSES, self._settings.window):
            return False
        middle = statistics.median(self._losses)
        deviation = _DEVIATION * statistics.median(abs(value - middle) for value in self._losses)
        return loss > middle + self._settings.threshold * max(deviation, _LEAST_DEVIATION * abs(middle))

    def tell(self, spike: Spike, back_to: int | None = None, left_out: range = range(0)) -> None:
        """Write `spike-STEP.json` and say what was found and what was done about it.

        Args:
          spike: which one.
          back_to: step of the checkpoint that the run went back to, None where it goes on.
          left_out: steps of the data that no update keeps.

        Raises:
          NonFiniteError: after too many times in one process.
        """
        heights = f"from {spike.usual:.4g} to {max(spike.losses):.4g}"
        found = f"the loss rose {heights} in steps {spike.first} to {spike.last}"
        if back_to is not None:
            self._rewinds += 1
            if self._rewinds > _MOST_REWINDS:
                raise NonFiniteError(
                    f"{found}, for the {self._rewinds}th time: going back does not help (config.spikes.rewind). Lower "
                    "optimizer.learning_rate, set optimizer.clip_norm, or look at the data named in spike-*.json"
                )
        if jax.process_index():
            return
        record = {**spike._asdict(), "back_to": back_to, "left_out": list(left_out)}
        address = self._folder.leave(f"spike-{spike.first}.json", record)
        done = (
            "nothing is done (config.spikes.rewind, or no checkpoint is old enough)"
            if back_to is None
            else f"back to step {back_to}, without the {len(left_out)} batches since"
        )
        _log.warning("%s; %s. See %s", found, done, address)
