"""The program that a plan compiles is the one that a run runs, to the last instruction."""

import json

import numpy as np
import pytest
from training import tiny

from vlmjax.training import compile


@pytest.mark.slow
def test_a_plan_has_the_memory_of_the_step_that_runs(tmp_path):
    run = tiny.python("tests/training/compile_program.py", tmp_path / "run", devices=8)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["batches"][0] == found["batches"][1]
    assert found["planned"] == found["ran"]
    assert found["ran"]["temp"] > 10_000 and found["ran"]["argument"] > 10_000
    assert "all-reduce" in found["ran"]["instructions"]
    assert (found["steps"], found["unit"]) == (2, 2 * 2 * 2)


def test_options_follow_the_devices():
    class Device:
        platform = "tpu"

    class Mesh:
        devices = np.array([[Device()]])

    options = compile.compiler_options.__wrapped__  # the shape check wants a real mesh
    assert options(Mesh()) == {"xla_max_concurrent_async_collective_permutes": "16"}
    Device.platform = "gpu"
    assert options(Mesh()) is None
