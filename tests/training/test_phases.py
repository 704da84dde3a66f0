"""Every second belongs to one phase, and the accounts of several attempts add up to the time that passed."""

import json

import pytest

from vlmjax.training.attempts import Attempts, account, goodput, read
from vlmjax.training.phases import PHASES, Phases
from vlmjax.training.workdir import Workdir


class Time:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self):
        return self.now


def test_every_second_belongs_to_one_phase():
    clock = Time()
    phases = Phases(began=98.0, clock=clock)
    for name, seconds in (("compile", 3.0), ("step", 1.0), ("data", 0.5), ("step", 2.0)):
        phases.enter(name)
        clock.now += seconds
    assert phases.now() == ("step", 2.0)
    seconds = phases.seconds()
    assert seconds["initialise"] == 2.0 and seconds["step"] == 3.0 and seconds["data"] == 0.5
    assert sum(seconds.values()) == clock.now - 98.0
    with pytest.raises(ValueError, match="no phase 'sleep'"):
        phases.enter("sleep")


def attempt(began, start, marks=(), **seconds):
    """A record of one; marks are (step, seconds in steps by then)."""
    first = {"step": start, "seconds": {"initialise": seconds.get("initialise", 0.0)}}
    more = [{"step": step, "seconds": {"step": spent}} for step, spent in marks]
    return {"began": began, "seconds": seconds, "marks": [first, *more]}


def test_work_after_the_checkpoint_that_was_gone_back_to_is_lost():
    first = attempt(0.0, 0, [(10, 50.0), (20, 100.0)], initialise=20.0, step=130.0)
    second = attempt(200.0, 20, [(30, 40.0)], initialise=10.0, step=60.0)
    third = attempt(270.0, 30, initialise=5.0, step=25.0)
    seconds = account([first, second, third])
    assert seconds["step"] == 100 + 40 + 25 and seconds["initialise"] == 35
    assert seconds["lost"] == 30 + 20 and seconds["down"] == 50
    assert sum(seconds.values()) == 300.0
    assert goodput(seconds) == pytest.approx(165 / 300)
    # A checkpoint that turned out to be damaged: an attempt that went further back makes more lost.
    seconds = account([first, second, attempt(270.0, 10, step=30.0)])
    assert seconds["step"] == 50 + 0 + 30 and seconds["lost"] == 80 + 60
    assert sum(seconds.values()) == 300.0


def test_attempts_are_found_again(tmp_path):
    folder, clock = Workdir(str(tmp_path)), Time()
    for start, saved in ((0, 4), (4, 8)):
        phases = Phases(clock=clock)
        attempts = Attempts(folder, phases, start)
        phases.enter("step")
        clock.now += 5.0
        attempts.saved(saved)
        clock.now += 2.0
        row = attempts.row()
        assert set(row) == {"goodput", *(f"seconds/{name}" for name in (*PHASES, "lost", "down"))}
    assert row["seconds/step"] == 12.0 and row["seconds/lost"] == 2.0
    assert [a["marks"][0]["step"] for a in read(tmp_path / "attempts.json")] == [0, 4]


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '[{"began": 1}]', "3", json.dumps([{"seconds": {}}] * 2)]
)
def test_a_damaged_file_ends_no_run(tmp_path, content):
    (tmp_path / "attempts.json").write_text(content)
    assert read(tmp_path / "attempts.json") == []
    assert read(tmp_path / "absent.json") == []


def test_marks_are_bounded_and_keep_the_first(tmp_path):
    attempts = Attempts(Workdir(str(tmp_path)), Phases(), 3)
    for step in range(4, 300):
        attempts.saved(step)
    attempts.row()
    steps = [mark["step"] for mark in read(tmp_path / "attempts.json")[0]["marks"]]
    assert steps == [3, *range(250, 300)]
