"""Steps that were started: their metrics, fetched one step late, and what happens when they are not finite."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vlmjax.errors import NonFiniteError
from vlmjax.training.spikes import Spikes
from vlmjax.training.workdir import Workdir

_MOST_FILES = 50  # of one process; a run that skips more has other sorrows than their names
_log = logging.getLogger(__name__)


class StartedSteps:
    """The step that was started last, with the count of updates that were skipped because they were not finite.

    Attributes:
        skipped: in the whole run.
        streak: those since the last update that was not.
        spikes: what looks at the loss of every step.
    """

    def __init__(self, folder: Workdir, limit: int, spikes: Spikes, skipped: int = 0, streak: int = 0):
        """`limit` skipped updates in a row end the run; the counts go on from a checkpoint's `state`."""
        self._folder, self._limit = folder, limit
        self.spikes: Spikes = spikes
        self.skipped, self.streak = skipped, streak
        self._last: tuple[int, Any, Sequence] | None = None
        self._metrics: Mapping[str, Any] = {}
        self._files = 0

    @property
    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "streak": self.streak}

    @property
    def doubtful(self) -> bool:
        """Whether the parameters may be wrong, so that they are better not saved."""
        return bool(self.streak or self.spikes.suspected)

    def forget(self) -> None:
        """Nothing more is wanted of the steps that were started: the run goes back before them."""
        self._last, self.streak = None, 0

    def started(self, step: int, metrics: Any, keys: Sequence) -> None:
        """Take note of a step whose metrics are still being computed, once those of the one before are checked."""
        self.settle()
        self._last = (step, metrics, keys)

    def settle(self) -> Mapping[str, Any]:
        """Metrics of the step that was started last, waited for.

        Raises:
          NonFiniteError: the streak has reached its limit. Parameters, moments and average are those before it.
        """
        if self._last is None:
            return self._metrics
        (step, metrics, keys), self._last = self._last, None
        self._metrics = jax.device_get(metrics)
        if self._metrics["finite"]:
            self.streak = 0
            self.spikes.see(step, float(self._metrics["loss"]))
        else:
            self.skipped, self.streak = self.skipped + 1, self.streak + 1
            self._not_finite(step, keys)
        return self._metrics

    def row(self) -> dict[str, Any]:
        """As `settle`, for a line of the log."""
        metrics = self.settle()
        row = {k: np.asarray(v).item() for k, v in metrics.items() if k not in ("finite", "finite_groups")}
        return {**row, "updates_skipped": self.skipped}

    def _not_finite(self, step: int, keys: Sequence) -> None:
        metrics, last = self._metrics, self.streak >= self._limit
        groups = sorted(name for name, ok in metrics["finite_groups"].items() if not ok)
        found = (
            f"step {step}: loss {metrics['loss']} and gradient norm {metrics['grad_norm']} are not finite "
            f"(parameter groups: {', '.join(groups) or 'none, the loss alone'})"
        )
        address = ""
        if last or self._files < _MOST_FILES:
            self._files += 1
            address = self._leave(step, groups, keys)
        if last:
            raise NonFiniteError(
                f"{found}, nor were they in {self.streak} step(s) in a row (config.nonfinite_limit); the examples of "
                f"the batch are in {address}. Lower optimizer.learning_rate, set optimizer.clip_norm, or exclude "
                "those records."
            )
        if jax.process_index() == 0:
            _log.warning("%s; its update is skipped. Its examples: %s", found, address or "not written")

    def _leave(self, step: int, groups: Sequence[str], keys: Sequence) -> str:
        name = f"nonfinite-{step}" + (f"-p{jax.process_index()}" if jax.process_count() > 1 else "") + ".json"
        record = {
            "step": step,
            "loss": str(self._metrics["loss"]),
            "grad_norm": str(self._metrics["grad_norm"]),
            "groups": list(groups),
            "keys": list(map(str, keys)),
        }
        return self._folder.leave(name, record)
