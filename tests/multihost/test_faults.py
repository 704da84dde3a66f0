"""Real faults in one of two real processes: the other notices within a bound, and both can start again."""

import json
import os
import signal
import time

import numpy as np
import pytest
from multihost.pair import PATIENCE, STEPS, Pair, run
from training import tiny

pytestmark = pytest.mark.slow
HEARTBEAT = 10  # seconds of silence after which a process is given up (30 by default)
# Noticing takes at most a heartbeat's time; the rest is for a machine that does other things meanwhile.
BOUND = HEARTBEAT + 50


def exact(workdir):
    """Losses by step, which must be equal bit for bit."""
    return [(row["step"], row["loss"]) for row in tiny.rows(workdir) if "loss" in row]


@pytest.mark.parametrize(("victim", "number"), [(1, signal.SIGKILL), (0, signal.SIGKILL)])
def test_a_process_is_killed(uninterrupted, tmp_path, victim, number):
    """The other exits with 75; started again, both end as if nothing had been, with the lost time accounted for."""
    folder, recipe = uninterrupted
    with Pair(tmp_path, recipe, tmp_path / "run", PACE="0.2", VLMJAX_HEARTBEAT=str(HEARTBEAT)) as pair:
        pair.until_step(8)
        began = time.monotonic()
        os.kill(pair.processes[victim].pid, number)
        code = pair.processes[1 - victim].wait(BOUND)
        print(f"noticed after {time.monotonic() - began:.1f} s")
        assert code == 75, pair.output()
    run(tmp_path, recipe, tmp_path / "run")
    assert exact(tmp_path / "run") == exact(folder / "run")
    last = [row for row in tiny.rows(tmp_path / "run") if "loss" in row][-1]
    assert last["seconds/lost"] + last["seconds/down"] > 0 and 0 < last["goodput"] < 1
    attempts = json.loads((tmp_path / "run" / "attempts.json").read_text())
    assert [a["marks"][0]["step"] for a in attempts] == [0, 5]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_stands_still(uninterrupted, tmp_path, victim):
    _, recipe = uninterrupted
    with Pair(tmp_path, recipe, tmp_path / "run", PACE="0.2", VLMJAX_HEARTBEAT=str(HEARTBEAT)) as pair:
        pair.until_step(3)
        os.kill(pair.processes[victim].pid, signal.SIGSTOP)
        assert pair.processes[1 - victim].wait(BOUND) == 75, pair.output()


def test_a_process_lives_but_is_stuck(uninterrupted, tmp_path):
    """Its heart beats, so that jax waits for ever; the watchdogs do not."""
    _, recipe = uninterrupted
    limit = "--config.watchdog=15"
    with Pair(tmp_path, recipe, tmp_path / "run", limit, STUCK="1:9", PACE="0.1") as pair:
        pair.until_step(8)
        codes = pair.codes(15 + BOUND)
        assert 76 in codes and set(codes) <= {75, 76}, (codes, pair.output())
        assert "stuck in phase" in pair.output() and "fault_program.py" in pair.output()


def test_a_host_slow_with_its_data_is_waited_for_and_named(uninterrupted, tmp_path):
    """Slow is not stuck: every batch is a sign of life."""
    folder, recipe = uninterrupted
    with Pair(tmp_path, recipe, tmp_path / "run", "--config.watchdog=30", PACE="0.5", SLOW="1") as pair:
        assert pair.codes(PATIENCE) == [0, 0], pair.output()
    assert exact(tmp_path / "run") == exact(folder / "run")
    rows = [row for row in tiny.rows(tmp_path / "run") if row.get("step", 0) > 2 and "loss" in row]
    assert rows and all(row["hosts/data_slowest"] == 1 for row in rows)
    assert all(row["hosts/data_longest"] > 0.4 * (row["hosts/data_seconds"] > 0) for row in rows)


def test_one_nan_skips_one_update(uninterrupted, tmp_path):
    folder, recipe = uninterrupted
    run(tmp_path, recipe, tmp_path / "run", NAN_AT="10")
    found, expected = (dict(exact(path / "run")) for path in (tmp_path, folder))
    assert found.pop(10) == "nan" and len(found) == STEPS - 1
    assert [found[step] for step in range(1, 10)] == [expected[step] for step in range(1, 10)]
    assert all(np.isfinite(loss) for loss in found.values())
    assert found[11] != expected[11]
    skipped = [row["updates_skipped"] for row in tiny.rows(tmp_path / "run") if "loss" in row]
    assert skipped == [0] * 9 + [1] * (STEPS - 9)
    left = [json.loads((tmp_path / "run" / f"nonfinite-10-p{i}.json").read_text()) for i in range(2)]
    first, second = (set(record["keys"]) for record in left)
    assert len(first) == len(second) == 8 and not first & second
    (attempt,) = json.loads((tmp_path / "run" / "attempts.json").read_text())
    assert [mark["step"] for mark in attempt["marks"]] == [0, 5, 11, 15, STEPS]  # the checkpoint of 10 waited


def test_nan_for_good_ends_the_run_before_it_is_saved(uninterrupted, tmp_path):
    _, recipe = uninterrupted
    limit = "--config.nonfinite_limit=3"
    output = run(tmp_path, recipe, tmp_path / "run", limit, code=77, NAN_AT="8-")
    assert output.count("error: step 10: loss nan") == 2
    saved = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved == ["5"]
    assert (tmp_path / "run" / "nonfinite-10-p0.json").exists()
