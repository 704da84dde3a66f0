"""A probe on a shard by any number of processes; each writes the result it was given."""

import json
import sys
from pathlib import Path

import jax

from vlmjax import evaluate
from vlmjax.evals.benchmark import Benchmark
from vlmjax.evals.choose import Evaluators
from vlmjax.sharding import distributed
from vlmjax.sharding.mesh import make_mesh

if __name__ == "__main__":
    model_folder, shard, out = sys.argv[1:]
    distributed.initialize()
    mesh = make_mesh()
    model, params, tokenizer, transform = evaluate.load_model(model_folder, mesh, "probe")
    benchmark = Benchmark("p", "probe", shard, train=shard, train_examples=20, batch_size=8)
    result = Evaluators(model, tokenizer, transform, mesh).of(benchmark).run(params, details=False)
    found = {"devices": jax.device_count(), **result.to_json()}
    Path(out, f"{jax.process_index()}.json").write_text(json.dumps(found))
