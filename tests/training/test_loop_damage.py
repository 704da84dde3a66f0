"""Whole runs whose storage lets them down: a failed write ends them at once, a damaged checkpoint is not trained on."""

import json

import pytest
from training import damage, tiny

pytestmark = pytest.mark.slow

# The train command on a disk that is full when the checkpoint of step 60 is to be finished.
FULL_DISK = """
import sys
import orbax.checkpoint as ocp
finalize = ocp.StandardCheckpointHandler.finalize
def full(self, directory):
    if "/60." in str(directory):
        raise OSError(28, "No space left on device")
    return finalize(self, directory)
ocp.StandardCheckpointHandler.finalize = full
from absl import app
from vlmjax import main
app.run(main.main, flags_parser=main.parse)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny.write_recipe(
        tmp_path_factory.mktemp("recipe"), total__steps=6, checkpoint__every__steps=2, checkpoint__keep_last=3
    )


def test_a_damaged_checkpoint_is_not_trained_on(recipe, tmp_path):
    """The run goes on from the one before, says why, and ends with the losses of the undisturbed run."""
    arguments = (f"--config={recipe}", f"--workdir={tmp_path}/run")
    first = tiny.python("-m", "vlmjax.main", *arguments)
    assert first.returncode == 0, first.stderr
    rows, folder = tiny.losses(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    record = json.loads((folder / "6" / "record" / "metadata").read_text())["record"]
    assert record["recipe"]["batch_size"] == 16 and record["seed"] == record["recipe"]["seed"] == 0
    assert record["environment"]["mesh"]["data"] == 1 and "jax" in record["environment"]["packages"]
    payload = max((folder / "6" / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    damage.flip(0.5)(payload)
    again = tiny.python("-m", "vlmjax.main", *arguments)
    assert again.returncode == 0, again.stderr
    assert "steps       4 to 6 (continued)" in again.stdout
    assert again.stderr.count(f"checkpoint  damaged: {folder}/6: ") == 1
    assert tiny.losses(tmp_path / "run") == rows
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4", "6", "6.damaged"]


def test_a_write_that_fails_ends_the_run(recipe, tmp_path):
    """Long before the next checkpoint is due, with the reason and an exit code that is not 0."""
    steps = ("--config.total.steps=120", "--config.checkpoint.every.steps=60")
    run = tiny.python("-c", FULL_DISK, f"--config={recipe}", f"--workdir={tmp_path}/run", *steps)
    assert run.returncode == 1, run.stdout + run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "cannot be written" in last and "No space left on device" in last
    assert 60 <= len(tiny.losses(tmp_path / "run")) < 120
