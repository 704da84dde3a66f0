"""Scores of classes against the right ones: what every benchmark of a classifier says."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from vlmjax.evals import gallery
from vlmjax.evals.benchmark import Benchmark, EvalResult
from vlmjax.evals.embed import Embedded
from vlmjax.evals.pictures import Pictures, reasons
from vlmjax.evals.ranks import ranks_of_positives

METRICS = ("top1", "top5", "mean_per_class")


def score_classes(
    scores: Float[np.ndarray, "images classes"], labels: Int[np.ndarray, " images"]
) -> dict[str, Any]:
    """Top-1, top-5, and the mean over classes of the top-1 of each, of those that some image is of.

    Returns:
        `metrics` and `chance` (fractions), `predictions` int64 [images].

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    rank = ranks_of_positives(scores, [[label] for label in labels.tolist()]).stable
    hits, total = np.bincount(labels, rank < 1), np.bincount(labels)
    each = hits[total > 0] / total[total > 0]
    found = [float(np.mean(rank < 1)), float(np.mean(rank < 5)), float(np.mean(each))]
    number = scores.shape[1]
    chance = [1 / number, min(5, number) / number, 1 / number]
    return {
        "metrics": dict(zip(METRICS, found, strict=True)),
        "chance": dict(zip(METRICS, chance, strict=True)),
        "predictions": scores.argmax(axis=1),
    }


def labels_of(embedded: Embedded) -> Int[np.ndarray, " images"]:
    """The `label` of every image's note."""
    return np.array([note["label"] for note in embedded.notes], np.int64)


def result_of(
    benchmark: Benchmark,
    names: Sequence[str],
    scores: Float[np.ndarray, "images classes"],
    pictures: Pictures,
    seen: Embedded,
    *,
    kind: str,
    details: bool,
    **more: Any,
) -> EvalResult:
    """What a classifier's scores of `seen` images say; `kind` is what the report calls it, `more` are counts.

    Raises NonFiniteError.
    """
    labels = labels_of(seen)
    scored = score_classes(scores, labels)
    counts = pictures.counts(seen) | {"classes": len(names), **more}
    found = (scored["metrics"], scored["chance"], counts, reasons(seen))
    result = EvalResult(benchmark.name, benchmark.benchmark, *found)
    if details and jax.process_index() == 0:

        def thumbnail(at: int) -> np.ndarray:
            return pictures.thumbnail(seen.notes[at]["index"])

        shown = gallery.zeroshot_details(names, labels[:, None].tolist(), scored["predictions"], thumbnail)
        result.details = {**shown, "kind": kind}
    return result
