"""kill -9 while a checkpoint is being written: one that was finished is never lost, and the next run goes on."""

import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from training import tiny
from training.save_program import values

from vlmjax.sharding.mesh import make_mesh, replicated
from vlmjax.training.checkpoint import Checkpoints

PROGRAM = Path(__file__).with_name("save_program.py")


def killed(folder, moment, after):
    """The last checkpoint a run said it had finished, killed `moment` seconds after beginning its `after`th one."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder)], env=tiny.environment(), stdout=subprocess.PIPE, text=True
    )
    began, finished = 0, 0
    while began < after:
        line = process.stdout.readline()
        assert line, process.wait()
        began += line.startswith("began")
        finished = int(line.split()[1]) if line.startswith("finished") else finished
    time.sleep(moment)
    process.kill()
    for line in process.communicate()[0].splitlines():
        finished = int(line.split()[1]) if line.startswith("finished") else finished
    return finished


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, capsys, kills):
    draw, place = random.Random(kills), replicated(make_mesh())
    abstract = {"params": {"w": jax.ShapeDtypeStruct((1024, 1024), np.float32, sharding=place)}}
    unfinished = 0
    for _ in range(kills):
        finished = killed(tmp_path / "c", draw.choice([0, 0.002, 0.01, 0.03, 0.1]), after=2)
        unfinished += any("tmp" in path.name for path in (tmp_path / "c").iterdir())
        reader = Checkpoints(str(tmp_path / "c"), writable=False)
        state, data = reader.restore_newest(abstract)
        assert data["step"] >= finished >= 1
        np.testing.assert_array_equal(state["params"]["w"], values(data["step"])["params"]["w"])
        assert capsys.readouterr().err == ""  # nothing was damaged
    print(f"{unfinished} of {kills} left a checkpoint half written")
    assert unfinished >= kills // 5 or kills < 10
    writer = Checkpoints(str(tmp_path / "c"))
    writer.save(1000, {"params": {"w": jax.numpy.asarray(values(1000)["params"]["w"])}}, {"step": 1000}, {})
    writer.close()
    assert all(path.name.isdigit() for path in (tmp_path / "c").iterdir())
