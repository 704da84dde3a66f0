"""Retrieval in two looks: cosines find the nearest candidates, image-text matching puts those in order (BLIP)."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vlmjax.errors import DataError
from vlmjax.evals.embed import read_batches
from vlmjax.evals.ranks import best_candidates, score_blocks
from vlmjax.ops.pixels import normalized
from vlmjax.sharding.activations import on_mesh
from vlmjax.sharding.mesh import batch_shards, local_rows, replicated, to_global

# Texts that look at an image at a time: its states are made once for so many.
TEXTS = 32
# Below every score of a candidate that was looked at; double precision still tells the cosines of the others apart.
FAR = 1e6


class Matches:
    """What matching says of some pairs of image and text: logits of a match, found by the pair's number."""

    def __init__(self, numbers: np.ndarray, logits: np.ndarray, texts: int):
        """`numbers` are image * texts + text, int64, increasing; `logits` float [pairs]."""
        self._numbers, self._logits, self._texts = numbers, logits, texts

    def rescored(self, rows: range, cosines: np.ndarray, k: int, rows_are_texts: bool) -> np.ndarray:
        """Scores, float64, of a block of queries: logit + cosine for the k nearest, the others behind them by cosine.

        Source: the released evaluation (salesforce/BLIP, train_retrieval.py), which gives all others one score.
        """
        scores = cosines.astype(np.float64) - FAR
        near = best_candidates(cosines, k)
        own = np.arange(rows.start, rows.stop, dtype=np.int64)[:, None]
        numbers = near * self._texts + own if rows_are_texts else own * self._texts + near
        places = np.searchsorted(self._numbers, numbers)
        np.put_along_axis(scores, near, self._logits[places] + np.take_along_axis(cosines, near, 1), axis=1)
        return scores


def pairs_to_match(images: np.ndarray, texts: np.ndarray, k: int) -> np.ndarray:
    """Numbers of the pairs that are among the k nearest of their image or of their text: int64, increasing."""
    found = [np.zeros(0, np.int64)]
    for rows, cosines in score_blocks(images, texts):
        own = np.arange(rows.start, rows.stop, dtype=np.int64)[:, None]
        found.append((own * len(texts) + best_candidates(cosines, k)).ravel())
    for rows, cosines in score_blocks(texts, images):
        own = np.arange(rows.start, rows.stop, dtype=np.int64)[:, None]
        found.append((best_candidates(cosines, k) * len(texts) + own).ravel())
    return np.unique(np.concatenate(found))


class Matcher:
    """Image-text matching as one compiled function: some images, each with TEXTS texts."""

    def __init__(self, model: Any, tokenizer: Any, transform: Any, mesh: jax.sharding.Mesh):
        """`model` has `encode_image` and `match` (models/blip.py); the others are its own."""
        self.tokenizer, self.transform, self.mesh = tokenizer, transform, mesh

        @on_mesh(mesh)
        def logits(params: Any, pixels: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
            def forward(module: Any) -> jax.Array:
                states = module.encode_image(normalized(pixels, transform.mean, transform.std))
                # Texts of one image lie side by side and meet its states as one row: see models/bert.py.
                return module.match(states, *(x.reshape(-1, x.shape[-1]) for x in (ids, mask)))

            return model.apply({"params": params}, method=forward)[:, 1].reshape(ids.shape[:2])

        self._logits = jax.jit(logits, out_shardings=replicated(mesh))

    def __call__(
        self,
        params: Any,
        source: Any,
        indices: Sequence[int],
        texts: Sequence[str],
        numbers: np.ndarray,
        *,
        batch_size: int,
        threads: int,
    ) -> Matches:
        """Look at pairs.

        Args:
            params: on the mesh.
            source: of the images.
            indices: image i is that of record indices[i].
            texts: known to every process.
            numbers: from `pairs_to_match`.
            batch_size: pairs at a time, about.
            threads: records read at a time per process.

        Raises:
            DataError: an image that could be read before cannot now.
        """
        jobs = _jobs(numbers, len(texts))
        shards = batch_shards(self.mesh)
        size = -(-max(1, min(batch_size // TEXTS, len(jobs))) // shards) * shards
        own = local_rows(self.mesh, size)
        words = self.tokenizer(texts)
        logits = np.zeros(len(numbers), np.float64)
        records = [indices[numbers[job.start] // len(texts)] for job in jobs]
        read = (source, records, own, size, self.transform, lambda record: {})
        for number, batch in enumerate(read_batches(*read, threads=threads)):
            bad = next((note for note in batch.rows if note and "reason" in note), None)
            if bad:
                raise DataError(f"{bad['key']} could be read a moment ago and cannot now: {bad['reason']}")
            mine = jobs[number * size : (number + 1) * size]
            places = np.zeros((size, TEXTS), np.int64)
            for row, job in enumerate(mine):
                places[row, : len(job)] = numbers[job.start : job.stop] % len(texts)
            rows = places[own.start : own.stop]
            local = {
                "pixels": batch.pixels,
                "ids": words["input_ids"][rows],
                "mask": words["attention_mask"][rows],
            }
            given = to_global(local, self.mesh, size)
            found = np.asarray(self._logits(params, given["pixels"], given["ids"], given["mask"]))
            for row, job in enumerate(mine):
                logits[job.start : job.stop] = found[row, : len(job)]
        return Matches(numbers, logits, len(texts))


def _jobs(numbers: np.ndarray, texts: int) -> list[range]:
    """Pairs of one image each, at most TEXTS: ranges of places in `numbers`."""
    ends = np.flatnonzero(np.diff(numbers // texts)) + 1
    runs = zip([0, *ends.tolist()], [*ends.tolist(), len(numbers)], strict=True)
    return [
        range(start, min(start + TEXTS, end)) for first, end in runs for start in range(first, end, TEXTS)
    ]
