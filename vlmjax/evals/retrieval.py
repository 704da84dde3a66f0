"""Image-text retrieval: recall at k in both directions, and the paired metrics watched while training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlmjax.evals.ranks import Ranks, blocked_ranks, chance_of_hit, ranks_of_positives

CUTOFFS = (1, 5, 10)
Rows = Sequence[Any] | np.ndarray  # nested lists of numbers, or an array
Rescore = Callable[[range, np.ndarray], np.ndarray]


def recall(scores: Rows, txt2img: Rows) -> dict[str, float]:
    """Recall at 1, 5 and 10 in percent, for data with any number of captions per image.

    Image to text (`txt_*`) counts an image whose best-ranked caption is in the top k; text to image
    (`img_*`) counts a caption whose one image is in the top k. Ties go to the smaller index.

    Args:
        scores: [images, texts], similarity, larger is better.
        txt2img: [texts], the index of each text's image; every image has at least one text.

    Source: the evaluation of ALBEF and BLIP as LAVIS runs it (`RetrievalTask._report_metrics`).
    """
    table = np.asarray(scores)
    by_image: list[list[int]] = [[] for _ in range(len(table))]
    for text, image in enumerate(txt2img):
        by_image[image].append(text)
    out: dict[str, float] = {}
    for side, ranks in (
        ("txt", ranks_of_positives(table, by_image).stable),
        ("img", ranks_of_positives(table.T, [[image] for image in txt2img]).stable),
    ):
        out |= {f"{side}_r{k}": 100.0 * float(np.mean(ranks < k)) for k in CUTOFFS}
        out[f"{side}_r_mean"] = sum(out[f"{side}_r{k}"] for k in CUTOFFS) / len(CUTOFFS)
    out["r_mean"] = (out["txt_r_mean"] + out["img_r_mean"]) / 2
    return out


def paired(image_features: Rows, text_features: Rows, logit_scale: float) -> dict[str, float]:
    """Rank statistics where text i is the only right answer for image i, and the other way round.

    The measure watched on a validation batch: it under-reports when captions repeat or images have several
    captions, so it must not be compared with `recall`. Ranks in mean and median count from 1 (the median is
    floored); `R@k` are fractions. Source: open_clip's `get_clip_metrics`.

    Args:
        image_features: [pairs, width], as the model gives them (normalised).
        text_features: [pairs, width].
        logit_scale: positive factor on the scores.
    """
    scores = float(logit_scale) * np.asarray(image_features) @ np.asarray(text_features).T
    pairs = [[i] for i in range(len(scores))]
    out: dict[str, float] = {}
    for name, table in (("image_to_text", scores), ("text_to_image", scores.T)):
        ranks = ranks_of_positives(table, pairs).stable
        out[f"{name}_mean_rank"] = float(ranks.mean() + 1)
        out[f"{name}_median_rank"] = float(np.floor(np.median(ranks)) + 1)
        out |= {f"{name}_R@{k}": float(np.mean(ranks < k)) for k in CUTOFFS}
    return out


def distinct_captions(
    captions: Sequence[Sequence[str]],
) -> tuple[list[str], list[list[int]], list[list[int]]]:
    """Collapse equal captions, so that a repeated caption is one text with several right images.

    Where no caption repeats this is the usual protocol: every caption is a query with one right image. Where
    captions repeat (three drawings called "croissant"), a text-to-image query is asked once per distinct
    caption and any image carrying it is right; an image is right with any of its captions.

    Args:
        captions: for each image its captions, at least one.

    Returns:
        (texts in order of first appearance, texts of each image, images of each text).
    """
    index: dict[str, int] = {}
    texts_of_image = [sorted({index.setdefault(caption, len(index)) for caption in own}) for own in captions]
    images_of_text: list[list[int]] = [[] for _ in index]
    for image, texts in enumerate(texts_of_image):
        for text in texts:
            images_of_text[text].append(image)
    return list(index), texts_of_image, images_of_text


def score_retrieval(
    image_features: np.ndarray,
    text_features: np.ndarray,
    texts_of_image: Sequence[Sequence[int]],
    images_of_text: Sequence[Sequence[int]],
    rescore: Mapping[str, Rescore] | None = None,
) -> dict[str, Any]:
    """Recall both ways over a whole benchmark, in float32 and in blocks.

    Args:
        image_features: float [images, width], L2-normalised.
        text_features: float [texts, width], L2-normalised.
        texts_of_image: right texts of each image.
        images_of_text: right images of each text.
        rescore: for `text_to_image` and `image_to_text`, from the rows and cosines of a block of queries to the
            scores that count, such as `rerank.Matches.rescored`; None: cosines.

    Returns:
        `metrics` and `chance`: fractions under `text_to_image_r1`, ... `image_to_text_r10`; `ties`: queries
        whose rank a tie could move, and recall with every tie lost (only where there are any); `ranks`: per
        query, by direction.
    """
    directions = {
        "text_to_image": (text_features, image_features, images_of_text),
        "image_to_text": (image_features, text_features, texts_of_image),
    }
    out: dict[str, Any] = {"metrics": {}, "chance": {}, "ties": {}, "ranks": {}}
    for name, (queries, candidates, positives) in directions.items():
        again = (rescore or {}).get(name)
        ranks: Ranks = blocked_ranks(queries, candidates, positives, rescore=again)
        sizes = np.array([len(set(p)) for p in positives])
        out["ranks"][name] = ranks.stable
        for k in CUTOFFS:
            out["metrics"][f"{name}_r{k}"] = float(np.mean(ranks.stable < k))
            out["chance"][f"{name}_r{k}"] = chance_of_hit(len(candidates), sizes, k)
        tied = int(np.sum(ranks.optimistic != ranks.pessimistic))
        if tied:
            worst = {f"{name}_r{k}_ties_lost": float(np.mean(ranks.pessimistic < k)) for k in CUTOFFS}
            out["ties"] |= {f"{name}_tied_queries": tied} | worst
    return out
