"""Where the seconds of a run went, over all its starts: steps, everything around them, and what failures took."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vlmjax.training.phases import PHASES, Phases
from vlmjax.training.workdir import Workdir

# Done again after a failure, back to the checkpoint that the next attempt started from.
_WORK = ("step", "data", "evaluate", "checkpoint", "finish")
_MOST_MARKS = 50


def account(attempts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by phase since the first attempt began, with two more: `lost` and `down`. They add up to all of them.

    `lost` is work after the checkpoint that a later attempt went back to; `down` lies between the last sign of life of
    an attempt and the beginning of the next.

    Args:
      attempts: in order, each with `began` and `seconds` by phase, and `marks` of what had been spent
        when a step was saved (the first mark is the step it started from).
    """
    total = dict.fromkeys((*PHASES, "lost", "down"), 0.0)
    for i, attempt in enumerate(attempts):
        kept = {phase: attempt["seconds"].get(phase, 0.0) for phase in PHASES}
        later = attempts[i + 1 :]
        if later:
            back_to = min(other["marks"][0]["step"] for other in later)
            saved = [mark["seconds"] for mark in attempt["marks"] if mark["step"] <= back_to]
            for phase in _WORK:
                keep = saved[-1].get(phase, 0.0) if saved else 0.0
                total["lost"] += kept[phase] - keep
                kept[phase] = keep
            seen = attempt["began"] + sum(attempt["seconds"].values())
            total["down"] += max(0.0, later[0]["began"] - seen)
        for phase in PHASES:
            total[phase] += kept[phase]
    return total


def goodput(seconds: Mapping[str, float]) -> float:
    """The share of all seconds that was spent on steps whose result is still there."""
    return seconds["step"] / max(sum(seconds.values()), 1e-9)


class Attempts:
    """The starts of a run in attempts.json: this one and, from the file, those before."""

    def __init__(self, folder: Workdir, phases: Phases, start: int):
        """Begin an attempt at step `start`."""
        self._folder, self._phases = folder, phases
        self._before = read(folder.path("attempts.json"))
        self._began = time.time() - sum(phases.seconds().values())
        self._counted = dict.fromkeys(PHASES, 0.0)
        self._marks: list[dict[str, Any]] = []
        self.saved(start)

    def _seconds(self) -> dict[str, float]:
        return {phase: spent - self._counted[phase] for phase, spent in self._phases.seconds().items()}

    def _now(self) -> dict[str, Any]:
        return {"began": self._began, "seconds": self._seconds(), "marks": self._marks}

    def went_back(self, step: int) -> None:
        """Begin another attempt in this process, from a step that is saved; what came after it is lost."""
        self._before.append(self._now())
        self._began, self._counted = time.time(), self._phases.seconds()
        self._marks = []
        self.saved(step)

    def saved(self, step: int) -> None:
        """Take note that what was done up to here is saved as `step`."""
        self._marks.append({"step": step, "seconds": self._seconds()})
        del self._marks[1:-_MOST_MARKS]

    def row(self) -> dict[str, float]:
        """Write the file; returns `goodput` and `seconds/PHASE` of the run so far, for its log."""
        attempts = [*self._before, self._now()]
        self._folder.write_json("attempts.json", attempts)
        seconds = account(attempts)
        return {"goodput": goodput(seconds), **{f"seconds/{name}": s for name, s in seconds.items()}}


def read(path: Any) -> list[dict[str, Any]]:
    """The attempts of a file; none where it is absent or damaged, which is no reason to end a run."""
    try:
        attempts = json.loads(path.read_text())
        account(attempts)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
    return attempts
