"""Several TPU slices: copies of the model on each, the network between them for gradients alone."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training import tiny

PROGRAM = Path(__file__).with_name("slices_program.py")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which compiles without a TPU"
)
def test_four_v5e_pods():
    """1,024 chips in a process of their own: the compiler is not the test's platform, and holds a lock file."""
    env = {**tiny.environment(), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(tiny.ROOT), str(tiny.ROOT / "tests")])
    command = [sys.executable, str(PROGRAM), "v5e:16x16", "4", "16", "4"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["shape"] == {"data": 16, "fsdp": 16, "tensor": 4}
    assert found["slices along data"] == [[row // 4] for row in range(16)]
    assert found["slices along data, fsdp a slice"] == [[0], [1], [2], [3]]
    assert found["links along tensor"] == [1]
    assert 0 < found["temp"] < 20e6
