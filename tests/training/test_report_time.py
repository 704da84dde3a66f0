"""The account of time in the report."""

import json

from vlmjax.training import report_time
from vlmjax.training.report import write_report
from vlmjax.training.report_time import duration, times

ONE = {
    "began": 0.0,
    "seconds": {"initialise": 10.0, "step": 80.0, "compile": 10.0},
    "marks": [{"step": 0, "seconds": {"initialise": 10.0}}, {"step": 5, "seconds": {"step": 60.0}}],
}
TWO = {**ONE, "began": 100.0, "marks": [{"step": 5, "seconds": {}}]}


def test_phases_that_took_time_are_shown_with_their_share():
    page = times([ONE, TWO])
    assert "70.0%" in page and "2 min" in page  # (60 + 80) of 200 seconds
    assert "2 starts" in page and report_time.LEAD not in page
    assert "work lost" in page and "10.0%" in page and "20.0 s" in page
    assert "between starts" not in page and "evaluation" not in page
    assert times([]) == ""


def test_it_is_part_of_the_report(tmp_path):
    (tmp_path / "attempts.json").write_text(json.dumps([ONE]))
    page = write_report(tmp_path).read_text()
    assert "Where the time went" in page and report_time.LEAD in page
    (tmp_path / "attempts.json").write_text("[")
    assert "Where the time went" not in write_report(tmp_path).read_text()


def test_durations():
    assert [duration(s) for s in (0.04, 59.9, 61, 3540, 3600, 12000)] == [
        "0.0 s", "59.9 s", "1 min", "59 min", "1 h 0 min", "3 h 20 min",
    ]  # fmt: skip
