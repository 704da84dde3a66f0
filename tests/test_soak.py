"""What the soak takes for the same run: every loss, every gradient norm and every saved array."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from vlmjax.training.checkpoint import Checkpoints

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "soak.py"


@pytest.fixture
def soak():
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder, *, steps=(1, 2), loss=0.5, norm=1.0, value=3.0):
    checkpoints = Checkpoints(str(folder / "checkpoints"))
    checkpoints.save(2, {"params": {"w": np.full(4, value, np.float32)}}, {"step": 2}, {})
    checkpoints.close()
    rows = [{"step": step, "loss": loss, "grad_norm": norm} for step in steps]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"loss": np.nextafter(0.5, 1)}, ["(1, 0.5", "(2, 0.5"]),
        ({"norm": 2.0}, ["(1, 0.5, 2.0)", "(2, 0.5, 2.0)"]),
        ({"value": 4.0}, ["params/w was saved with other values"]),
        ({"steps": (1, 2, 2)}, ["does not have every step once"]),
    ],
)
def test_what_differs_is_found(soak, tmp_path, changes, found):
    undisturbed, soaked = write(tmp_path / "undisturbed"), write(tmp_path / "soaked", **changes)
    wrong = soak.differences(soaked, undisturbed, 2)
    assert len(wrong) == len(found)
    assert all(part in line for line, part in zip(wrong, found, strict=True))
