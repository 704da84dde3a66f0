"""Spikes of the loss: what is one, what is not, and a run that goes back before one."""

import json
import logging

import numpy as np
import pytest
from training import tiny

from vlmjax import config
from vlmjax.errors import NonFiniteError
from vlmjax.training.spikes import Spikes
from vlmjax.training.workdir import Workdir


def looking(folder, state=None, **changes):
    settings = config.recipe().spikes
    settings.update({"threshold": 8.0, "window": 50, "steps": 3, **changes})
    return Spikes(Workdir(str(folder)), settings, **(state or {}))


def found(spikes, losses, first=1):
    out = []
    for step, loss in enumerate(losses, first):
        spikes.see(step, loss)
        if spikes.pending:
            out.append(spikes.pending)
            spikes.pending = None
    return out


def falling(count, seed=0):
    """A loss that falls as they do, with noise of one part in fifty."""
    noise = np.random.default_rng(seed).normal(1.0, 0.02, count)
    return (6.0 * np.exp(-np.arange(count) / 200) * noise + 1.0).tolist()


def test_a_falling_noisy_loss_has_none(tmp_path):
    for seed in range(20):
        spikes = looking(tmp_path)
        assert found(spikes, falling(1000, seed)) == [] and not spikes.suspected


def test_a_spike_is_named_when_it_lasts(tmp_path):
    losses = falling(200)
    losses[150:153] = [9.0, 11.0, 10.0]
    (spike,) = found(looking(tmp_path), losses)
    assert (spike.first, spike.last, spike.losses) == (151, 153, (9.0, 11.0, 10.0))
    assert spike.usual == pytest.approx(np.median(losses[100:150]))


def test_single_high_losses_are_no_spike_but_suspect(tmp_path):
    spikes = looking(tmp_path)
    losses = falling(100)
    assert found(spikes, [*losses, 9.0, 9.0]) == [] and spikes.suspected
    assert found(spikes, losses[:1], 103) == [] and not spikes.suspected


def test_losses_that_hardly_vary_need_more_than_a_ripple(tmp_path):
    assert found(looking(tmp_path), [2.0] * 60 + [2.05] * 10) == []
    assert len(found(looking(tmp_path), [2.0] * 60 + [2.5] * 3)) == 1


def test_too_few_losses_say_nothing_and_zero_switches_it_off(tmp_path):
    assert found(looking(tmp_path), [2.0] * 10 + [9.0] * 5) == []
    assert found(looking(tmp_path, threshold=0.0), [2.0] * 60 + [9.0] * 5) == []
    assert found(looking(tmp_path), [2.0] * 60 + [float("nan")] * 5) == []  # another guard's matter


def test_it_goes_on_over_a_restart_as_if_there_had_been_none(tmp_path):
    losses = falling(120)
    losses[100:103] = [9.0] * 3
    for cut in (60, 101, 102):
        before = looking(tmp_path)
        assert found(before, losses[:cut]) == []
        state = json.loads(json.dumps(before.state))
        (spike,) = found(looking(tmp_path, state), losses[cut:], cut + 1)
        assert (spike.first, spike.last) == (101, 103)


def test_one_that_nobody_has_dealt_with_is_kept(tmp_path):
    spikes = looking(tmp_path)
    for step, loss in enumerate([2.0] * 60 + [9.0] * 3, 1):
        spikes.see(step, loss)
    again = looking(tmp_path, json.loads(json.dumps(spikes.state)))
    assert spikes.suspected and again.suspected
    assert again.pending == spikes.pending and again.pending.last == 63


def test_what_is_told_and_that_it_ends(tmp_path, caplog):
    spikes = looking(tmp_path)
    (spike,) = found(spikes, [2.0] * 60 + [9.0] * 3)
    with caplog.at_level(logging.WARNING):
        spikes.tell(spike)
        spikes.tell(spike, 40, range(40, 63))
    record = json.loads((tmp_path / "spike-61.json").read_text())
    assert record["back_to"] == 40 and record["left_out"] == list(range(40, 63))
    assert "nothing is done" in caplog.messages[0] and "without the 23 batches" in caplog.messages[1]
    with pytest.raises(NonFiniteError, match=r"config\.spikes\.rewind") as error:
        for _ in range(20):
            spikes.tell(spike, 40, range(40, 63))
    assert error.value.exit_code == 77


# The train command with a loss that is reported too high after some data: those that the run must leave out.
SPIKING = """
import os, sys
import numpy as np
from vlmjax.training import loop
lo, hi = map(int, os.environ["BAD_DATA"].split(","))
update = loop.Run._update
def spiking(self):
    at = self.data.step
    update(self)
    step, metrics, keys = self.steps._last or (None, None, None)
    if step == self.step and lo <= at < hi:
        self.steps._last = (step, {**metrics, "loss": np.float32(99.0)}, keys)
    print("update", self.step, "data", at, flush=True)
loop.Run._update = spiking
from absl import app
from vlmjax import main
app.run(main.main, flags_parser=main.parse)
"""


@pytest.mark.slow
def test_a_run_goes_back_and_leaves_the_data_out(tmp_path):
    changes = {
        "total__steps": 40,
        "checkpoint__every__steps": 4,
        "checkpoint__keep_last": 20,
        "spikes": {"threshold": 10.0, "window": 30, "steps": 2, "rewind": 3},
    }
    recipe = tiny.write_recipe(tmp_path, **changes)
    arguments = ("-c", SPIKING, f"--config={recipe}", f"--workdir={tmp_path / 'run'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAD_DATA", "25,27")
        done = tiny.python(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    updates = [
        tuple(map(int, line.split()[1::2])) for line in done.stdout.splitlines() if "update " in line[:7]
    ]
    # Steps 26 and 27 are high. Three steps before 26, the newest checkpoint is that of 20.
    assert updates == [(i, i - 1) for i in range(1, 28)] + [(i, i + 6) for i in range(21, 41)]
    assert [row["step"] for row in tiny.rows(tmp_path / "run") if "loss" in row] == list(range(1, 41))
    record = json.loads((tmp_path / "run" / "spike-26.json").read_text())
    assert record["back_to"] == 20 and record["left_out"] == list(range(20, 27))
    assert (tmp_path / "run" / "checkpoints" / "24.spiked" / "why.txt").exists()
    attempts = json.loads((tmp_path / "run" / "attempts.json").read_text())
    assert len(attempts) == 2 and tiny.rows(tmp_path / "run")[-2]["seconds/lost"] > 0
    assert "back to step 20, without the 7 batches since" in done.stderr

    # A run that never saw those data, from the same checkpoint on, is the same run; so is one that goes on later.
    rows = {row["step"]: row["loss"] for row in tiny.rows(tmp_path / "run") if "loss" in row}
    for step in (32, 36, 40):
        done = tiny.python("-c", f"import shutil; shutil.rmtree('{tmp_path}/run/checkpoints/{step}')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BAD_DATA", "25,27")
        done = tiny.python(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "update 29 data 35" in done.stdout
    again = {row["step"]: row["loss"] for row in tiny.rows(tmp_path / "run") if "loss" in row}
    assert again == rows
