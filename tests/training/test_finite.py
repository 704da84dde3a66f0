"""Steps that are not finite: counted once, named, and the end of the run when they come in a row."""

import json
import logging

import numpy as np
import pytest

from vlmjax import config
from vlmjax.errors import NonFiniteError
from vlmjax.training.finite import StartedSteps
from vlmjax.training.spikes import Spikes
from vlmjax.training.workdir import Workdir


def metrics(finite):
    value = np.float32(1.0 if finite else np.nan)
    flags = {"tower": np.bool_(finite), "other": np.bool_(True)}
    return {"loss": value, "grad_norm": value, "finite": np.bool_(finite), "finite_groups": flags}


def started(folder, limit, **state):
    spikes = Spikes(folder, config.recipe().spikes)
    return StartedSteps(folder, limit, spikes, **state)


def take(steps, pattern):
    """Start a step for each letter: `.` is finite, `x` is not."""
    for step, letter in enumerate(pattern, 1):
        steps.started(step, metrics(letter == "."), [f"key{step}"])
    steps.settle()


def test_isolated_ones_are_counted_and_named(tmp_path, caplog):
    steps = started(Workdir(str(tmp_path)), 3)
    with caplog.at_level(logging.WARNING):
        take(steps, "..x.xx.")
    assert steps.state == {"skipped": 3, "streak": 0}
    assert steps.settle()["finite"] and steps.row()["updates_skipped"] == 3
    assert sorted(path.name for path in tmp_path.glob("nonfinite-*")) == [
        f"nonfinite-{step}.json" for step in (3, 5, 6)
    ]
    record = json.loads((tmp_path / "nonfinite-3.json").read_text())
    assert record["keys"] == ["key3"] and record["groups"] == ["tower"] and record["loss"] == "nan"
    assert len(caplog.messages) == 3 and "its update is skipped" in caplog.messages[0]
    steps.started(8, metrics(False), [])
    for _ in range(3):  # asking again does not count again
        assert not steps.settle()["finite"] and steps.state == {"skipped": 4, "streak": 1}


@pytest.mark.parametrize(("limit", "pattern", "end"), [(3, ".xx.xxx.", 7), (1, "..x", 3)])
def test_a_streak_ends_the_run(tmp_path, limit, pattern, end):
    steps = started(Workdir(str(tmp_path)), limit)
    with pytest.raises(NonFiniteError, match=f"step {end}: loss nan .*{limit} step") as error:
        take(steps, pattern)
    assert str(tmp_path / f"nonfinite-{end}.json") in str(error.value)
    assert error.value.exit_code == 77


def test_a_streak_goes_on_over_a_restart(tmp_path):
    folder = Workdir(str(tmp_path))
    before = started(folder, 3)
    take(before, ".xx")
    with pytest.raises(NonFiniteError):
        take(started(folder, 3, **before.state), "x")


def test_files_are_bounded_but_for_the_last(tmp_path):
    steps = started(Workdir(str(tmp_path)), 100)
    with pytest.raises(NonFiniteError):
        take(steps, "x" * 100)
    assert len(list(tmp_path.glob("nonfinite-*"))) == 51
    assert (tmp_path / "nonfinite-100.json").exists()
