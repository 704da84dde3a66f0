"""Zero-shot classification: a classifier made of prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmjax.evals.ranks import chance_of_hit, ranks_of_positives, score_blocks

Rows = Sequence[Any] | np.ndarray  # nested lists of numbers, or an array


def normalize(features: np.ndarray) -> np.ndarray:
    """Scale the last axis to unit length, in the input's precision; a zero vector stays zero."""
    norm = np.linalg.norm(features, axis=-1, keepdims=True)
    return features / np.maximum(norm, np.finfo(features.dtype).tiny)


def build_classifier(text_embeddings: np.ndarray) -> np.ndarray:
    """Average prompts into one direction per class: normalise each, mean over templates, normalise again.

    Averaging the raw outputs instead would let long vectors dominate. [classes, templates, width] ->
    [classes, width]. Source: CLIP (Radford et al. 2021) section 3.1.4; open_clip.
    """
    return normalize(normalize(text_embeddings).mean(axis=1))


def classify(text_embeddings: Rows, image_features: Rows, labels: Rows) -> dict[str, Any]:
    """Classify images by the nearest prompt ensemble.

    Args:
        text_embeddings: [classes, templates, width], the text tower's outputs before or after normalisation.
        image_features: [images, width].
        labels: [images], the right class of each.

    Returns:
        `classifier` [classes, width], `logits` [images, classes] (100 x cosine), `pred` (arg max, smallest
        index where equal), `top1` and `top5` as fractions.
    """
    classifier = build_classifier(np.asarray(text_embeddings))
    logits = 100.0 * normalize(np.asarray(image_features)) @ classifier.T
    ranks = ranks_of_positives(logits, [[label] for label in labels]).stable
    return {
        "classifier": classifier.tolist(),
        "logits": logits.tolist(),
        "pred": logits.argmax(axis=1).tolist(),
        "top1": float(np.mean(ranks < 1)),
        "top5": float(np.mean(ranks < 5)),
    }


def score_zeroshot(
    classifier: np.ndarray, image_features: np.ndarray, labels: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Top-1 and top-5 over a whole benchmark, in float32 and in blocks.

    Args:
        classifier: float [classes, width], from `build_classifier`.
        image_features: float [images, width], L2-normalised.
        labels: the right classes of each image; a hit on any of them counts.

    Returns:
        `metrics` and `chance` (fractions under `top1`, `top5`), `predictions` int64 [images].
    """
    ranks, predictions = [], []
    for rows, scores in score_blocks(image_features, classifier):
        ranks.append(ranks_of_positives(scores, labels[rows.start : rows.stop]).stable)
        predictions.append(scores.argmax(axis=1))
    rank = np.concatenate(ranks)
    sizes = np.array([len(set(own)) for own in labels])
    return {
        "metrics": {f"top{k}": float(np.mean(rank < k)) for k in (1, 5)},
        "chance": {f"top{k}": chance_of_hit(len(classifier), sizes, k) for k in (1, 5)},
        "predictions": np.concatenate(predictions),
    }
