"""Two processes, each reading half of every batch, find what one process finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evals.tiny_model import write_model, write_shard
from vlmjax import evaluate
from vlmjax.evals.benchmark import Benchmark
from vlmjax.evals.runner import Evaluator
from vlmjax.sharding.mesh import make_mesh

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    write_model(tmp_path / "model")
    shard = tmp_path / "x.tar"
    write_shard(shard, [f"picture {i // 2}" for i in range(29)], damaged=[1, 13, 28])
    env = {name: value for name, value in os.environ.items() if not name.startswith("VLMJAX_")}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT)])
    options = ["--processes=2", "--devices_per_process=4", "--module=retrieval_program", "--"]
    command = [
        sys.executable,
        str(ROOT / "launch" / "local.py"),
        *options,
        tmp_path / "model",
        shard,
        tmp_path,
    ]
    run = subprocess.run(
        [str(part) for part in command], env=env, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stdout + run.stderr
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert first.pop("details") == ["image_to_text", "similarity", "text_to_image"]
    assert second.pop("details") == []
    assert first == second and first.pop("devices") == 8

    model, params, tokenizer, transform = evaluate.load_model(str(tmp_path / "model"), make_mesh())
    alone = Evaluator(
        Benchmark("r", "retrieval", str(shard), batch_size=8), model, tokenizer, transform, make_mesh()
    ).run(params)
    assert first == alone.to_json()
    assert alone.counts["skipped"] == 3
