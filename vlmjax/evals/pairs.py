"""Whether a model tells the caption of an image from that of another (image-text matching)."""

import itertools
import os
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmjax.data.captions import cleaned
from vlmjax.data.sources import captions_of, open_source
from vlmjax.errors import BadRecord, DataError
from vlmjax.evals.benchmark import Benchmark, EvalResult, key_at, select
from vlmjax.evals.embed import gather, read_batches, tell_skipped
from vlmjax.ops.pixels import normalized
from vlmjax.sharding.activations import on_mesh
from vlmjax.sharding.mesh import batch_shards, local_rows, replicated, to_global


class MatchingEvaluator:
    """Each image with its own caption and with one of another image, which says something else; chance is a half."""

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
        """Open the source and draw the other captions; no image is decoded.

        Args:
            benchmark: what to measure.
            model: with methods `encode_image` and `match` (models/blip.py).
            tokenizer: texts -> `input_ids`, `attention_mask`, int32 [texts, length].
            transform: an EvalTransform.
            mesh: the devices; every process of it has to make the same calls.
            source: used instead of opening `benchmark.data`.
            threads: records read at a time per process; 0 = number of CPU cores, at most 16.

        Raises:
            DataError: the source cannot be used, or all captions are equal.
        """
        self.benchmark, self.transform, self.mesh = benchmark, transform, mesh
        if source is None:
            source = open_source(benchmark.data, image_size=min(transform.output_size or (64,)))
        self.source, self.tokenizer = source, tokenizer
        self._threads = threads or min(os.cpu_count() or 1, 16)
        self.skipped: list[BadRecord] = []
        self.indices, self.captions = self._captions()
        self.others = other_captions(self.captions, benchmark.data)
        shards = batch_shards(mesh)
        wanted = min(benchmark.batch_size or 64, len(self.indices))
        self.batch_size = -(-wanted // shards) * shards

        @on_mesh(mesh)
        def logits(params: Any, pixels: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
            def both(module: Any) -> jax.Array:
                states = module.encode_image(normalized(pixels, transform.mean, transform.std))
                return jnp.stack([module.match(states, ids[:, k], mask[:, k]) for k in range(2)], axis=1)

            return model.apply({"params": params}, method=both)

        self._logits = jax.jit(logits, out_shardings=replicated(mesh))

    def _captions(self) -> tuple[list[int], list[str]]:
        indices, captions = [], []
        for index in select(self.source, self.benchmark):
            try:
                found = captions_of(self.source, index)
                if not found:
                    raise BadRecord("no_caption", key_at(self.source, index), "an image without a text")
            except BadRecord as error:
                self.skipped.append(error)
                continue
            indices.append(index)
            captions.append(cleaned(found[0], self.benchmark.clean))
        return indices, captions

    def run(self, params: Any, *, details: bool = True) -> EvalResult:
        """Measure a model's parameters (on the mesh). Every process gets the result. Raises DataError for no record."""
        own, right, bad = local_rows(self.mesh, self.batch_size), [], []
        batches = read_batches(
            self.source,
            self.indices,
            own,
            self.batch_size,
            self.transform,
            lambda _: {},
            threads=self._threads,
        )
        for number, batch in enumerate(batches):
            at = [number * self.batch_size + row for row in range(self.batch_size)]
            at = [place if place < len(self.indices) else 0 for place in at]
            local = {"pixels": batch.pixels, **self._texts([at[row] for row in own])}
            given = to_global(local, self.mesh, self.batch_size)
            scores = np.asarray(self._logits(params, given["pixels"], given["ids"], given["mask"]))
            says = scores.argmax(-1) == np.array([1, 0])
            for row, note in zip(own, batch.rows, strict=True):
                if note is not None and "reason" in note:
                    bad.append(note)
                elif note is not None:
                    right.append((number * self.batch_size + row, says[row].tolist()))
        # Processes that share rows have read the same ones.
        found = dict(itertools.chain(*gather(right)))
        failed = {note["index"]: note for note in itertools.chain(*gather(bad))}
        reasons = Counter(error.reason for error in self.skipped)
        reasons.update(note["reason"] for note in failed.values())
        tell_skipped(self.benchmark.name, list(failed.values()))
        if not found:
            raise DataError(f"{self.benchmark.data}: no record could be used ({dict(reasons)})")
        says = np.array(list(found.values()), np.float64)
        skipped = len(self.skipped) + len(failed)
        counts = {"records": len(found) + skipped, "used": len(found), "skipped": skipped}
        metrics = {
            "accuracy": float(says.mean()),
            "own": float(says[:, 0].mean()),
            "other": float(says[:, 1].mean()),
        }
        chance = dict.fromkeys(metrics, 0.5)
        return EvalResult(self.benchmark.name, "matching", metrics, chance, counts, dict(reasons))

    def _texts(self, places: list[int]) -> dict[str, np.ndarray]:
        parts = [self.tokenizer([texts[place] for place in places]) for texts in (self.captions, self.others)]
        names = {"ids": "input_ids", "mask": "attention_mask"}
        return {name: np.stack([part[key] for part in parts], axis=1) for name, key in names.items()}


def other_captions(captions: list[str], where: str) -> list[str]:
    """For each caption one of another record that says something else, the same ones every time.

    Those of a record half the data away, or the first after it that differs. Raises DataError where all are equal.
    """
    if len(set(captions)) < 2:
        raise DataError(f"{where}: its captions are all equal; matching needs at least two that differ")
    count, out = len(captions), []
    for at, own in enumerate(captions):
        steps = itertools.count(count // 2)
        out.append(next(found for step in steps if (found := captions[(at + step) % count]) != own))
    return out
