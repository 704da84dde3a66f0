"""Whether a model tells true statements about two images from false ones (NLVR2)."""

import itertools
import os
from collections import Counter
from typing import Any

import jax
import numpy as np

from vlmjax.data.sources import open_source
from vlmjax.data.statements import statement_of, truth_of, two_images
from vlmjax.errors import DataError
from vlmjax.evals.benchmark import Benchmark, EvalResult, select
from vlmjax.evals.embed import gather, read_batches, tell_skipped
from vlmjax.ops.pixels import normalized
from vlmjax.sharding.activations import on_mesh
from vlmjax.sharding.mesh import batch_shards, local_rows, replicated, to_global


class StatementEvaluator:
    """Benchmark `statements`; chance is the share of the more frequent of true and false."""

    def __init__(
        self,
        benchmark: Benchmark,
        model: Any,
        tokenizer: Any,
        transform: Any,
        mesh: jax.sharding.Mesh,
        *,
        source: Any = None,
        threads: int = 0,
    ):
        """Open the source. Arguments are those of `pairs.MatchingEvaluator`; `model` is a BlipNlvr.

        Raises:
            DataError: the source cannot be used.
        """
        self.benchmark, self.transform, self.mesh = benchmark, transform, mesh
        if source is None:
            source = open_source(benchmark.data, image_size=min(transform.output_size or (64,)))
        self.source, self.tokenizer, self.indices = source, tokenizer, select(source, benchmark)
        self._threads = threads or min(os.cpu_count() or 1, 16)
        shards = batch_shards(mesh)
        self.batch_size = -(-min(benchmark.batch_size or 64, len(self.indices)) // shards) * shards

        @on_mesh(mesh)
        def logits(params: Any, pixels: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
            return model.apply(
                {"params": params}, normalized(pixels, transform.mean, transform.std), ids, mask
            )

        self._logits = jax.jit(logits, out_shardings=replicated(mesh))

    def _describe(self, record: Any) -> dict[str, Any]:
        two_images(record)
        text = statement_of(record, self.benchmark.clean)
        return {"text": text, "truth": truth_of(record.extra, record.key)}

    def run(self, params: Any, *, details: bool = True) -> EvalResult:
        """Measure a model's parameters (on the mesh). Every process gets the result. Raises DataError for no record."""
        own, notes = local_rows(self.mesh, self.batch_size), []
        read = (self.source, self.indices, own, self.batch_size, self.transform, self._describe)
        for number, batch in enumerate(
            read_batches(*read, pictures=two_images, slots=2, threads=self._threads)
        ):
            words = self.tokenizer([(note or {}).get("text", "") for note in batch.rows])
            local = {"pixels": batch.pixels, "ids": words["input_ids"], "mask": words["attention_mask"]}
            given = to_global(local, self.mesh, self.batch_size)
            says = np.asarray(self._logits(params, given["pixels"], given["ids"], given["mask"])).argmax(-1)
            for row, note in zip(own, batch.rows, strict=True):
                if note is not None:
                    notes.append((number * self.batch_size + row, {**note, "says": bool(says[row])}))
        # Processes that share rows have read the same ones.
        found = list(dict(sorted(itertools.chain(*gather(notes)), key=lambda pair: pair[0])).values())
        bad = [note for note in found if "reason" in note]
        tell_skipped(self.benchmark.name, bad)
        used = [note for note in found if "reason" not in note]
        reasons = dict(Counter(note["reason"] for note in bad))
        if not used:
            raise DataError(f"{self.benchmark.data}: no record could be used ({reasons})")
        right = float(np.mean([note["says"] == note["truth"] for note in used]))
        true = float(np.mean([note["truth"] for note in used]))
        counts = {"records": len(found), "used": len(used), "skipped": len(bad)}
        chance = {"right": max(true, 1 - true)}
        return EvalResult(self.benchmark.name, "statements", {"right": right}, chance, counts, reasons)
