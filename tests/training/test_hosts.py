"""Hosts compared: who waits for data, who waits for that one."""

import json

import numpy as np
from jax.experimental import multihost_utils

from vlmjax.training import hosts
from vlmjax.training.phases import Phases
from vlmjax.training.report import write_report
from vlmjax.training.workdir import Workdir


def test_columns_name_the_straggler():
    row = hosts.columns(np.asarray([[1.0, 9.0, 2.0], [8.0, 0.5, 7.0]]))
    assert row == {
        "hosts/data_seconds": 2.0,
        "hosts/data_longest": 9.0,
        "hosts/data_slowest": 1,
        "hosts/step_seconds": 7.0,
        "hosts/step_longest": 8.0,
        "hosts/step_slowest": 0,
    }


def test_a_process_alone_has_nobody_to_compare_with(tmp_path):
    assert hosts.Hosts(Workdir(str(tmp_path)), Phases()).row() == {}
    assert not (tmp_path / "hosts.json").exists()


def test_sums_grow_line_by_line_and_are_shown(tmp_path, monkeypatch):
    """Three processes of which the second is twice as slow with its data."""
    time = [0.0]
    phases = Phases(0.0, clock=lambda: time[0])
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 3)
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda mine: np.stack([mine, mine * np.float32([2, 0.5]), mine])
    )
    report = hosts.Hosts(Workdir(str(tmp_path)), phases)
    for seconds in (3.0, 4.0):
        phases.enter("data")
        time[0] += seconds
        phases.enter("step")
        time[0] += 10.0
        row = report.row()
    assert row["hosts/data_seconds"] == 4.0 and row["hosts/data_longest"] == 8.0
    assert row["hosts/data_slowest"] == 1 and row["hosts/step_longest"] == 10.0
    sums = json.loads((tmp_path / "hosts.json").read_text())
    assert sums == {"data": [7.0, 14.0, 7.0], "step": [20.0, 10.0, 20.0]}
    assert [host for host, _ in hosts.slowest_first(sums)] == [1, 0, 2]
    page = write_report(tmp_path).read_text()
    assert page.index("host 1") < page.index("host 0") and "14.0 s" in page
