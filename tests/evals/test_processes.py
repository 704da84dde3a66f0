"""Two processes, each reading half of every batch, find what one process finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evals.tiny_model import NAMES, pixels, write_model, write_shard
from vlmjax import evaluate
from vlmjax.evals.benchmark import Benchmark
from vlmjax.evals.choose import Evaluators
from vlmjax.evals.runner import Evaluator
from vlmjax.sharding.mesh import make_mesh

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def run_pair(program, shard, tmp_path):
    """What each of two processes with four devices found."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("VLMJAX_")}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT)])
    options = ["--processes=2", "--devices_per_process=4", f"--module={program}", "--"]
    launcher = str(ROOT / "launch" / "local.py")
    command = [sys.executable, launcher, *options, tmp_path / "model", shard, tmp_path]
    run = subprocess.run(
        [str(part) for part in command], env=env, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    write_model(tmp_path / "model")
    shard = tmp_path / "x.tar"
    write_shard(shard, [f"picture {i // 2}" for i in range(29)], damaged=[1, 13, 28])
    first, second = run_pair("retrieval_program", shard, tmp_path)
    assert first.pop("details") == ["image_to_text", "similarity", "text_to_image"]
    assert second.pop("details") == []
    assert first == second and first.pop("devices") == 8

    model, params, tokenizer, transform = evaluate.load_model(str(tmp_path / "model"), make_mesh())
    alone = Evaluator(
        Benchmark("r", "retrieval", str(shard), batch_size=8), model, tokenizer, transform, make_mesh()
    ).run(params)
    assert first == alone.to_json()
    assert alone.counts["skipped"] == 3


@pytest.mark.slow
def test_a_probe_by_two_processes_equals_one(tmp_path):
    write_model(tmp_path / "model")
    shard = tmp_path / "x.tar"
    names = [NAMES[int(pixels(i).mean(axis=(0, 1)).argmax())] for i in range(31)]
    write_shard(shard, names, damaged=[1, 13, 28])
    first, second = run_pair("probe_program", shard, tmp_path)
    assert first == second and first.pop("devices") == 8
    model, params, *processor = evaluate.load_model(str(tmp_path / "model"), make_mesh(), "probe")
    benchmark = Benchmark("p", "probe", str(shard), train=str(shard), train_examples=20, batch_size=8)
    alone = Evaluators(model, *processor, make_mesh()).of(benchmark).run(params, details=False)
    assert first == alone.to_json()
    assert (alone.counts["skipped"], alone.counts["train_skipped"]) == (3, 2)
