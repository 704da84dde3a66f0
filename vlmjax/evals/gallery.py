"""What an evaluation leaves for the report: some queries with what they found, and usual confusions."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlmjax.data.images import decode, shrink
from vlmjax.evals.ranks import best_candidates

QUERIES = 8  # of each direction
FOUND = 5  # best candidates shown per query
PAIRS = 24  # pairs in the similarity matrix
CONFUSIONS = 14  # classes in the confusion table
Thumbnail = Callable[[int], np.ndarray]


def square_picture(image: Any, background: tuple[int, int, int], size: int) -> np.ndarray:
    """The middle of an image, small, for a page: uint8 [size, size, 3] or less. Raises BadRecord."""
    pixels = shrink(decode(image, background=background), size)
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def retrieval_details(
    image_features: np.ndarray,
    text_features: np.ndarray,
    texts: Sequence[str],
    texts_of_image: Sequence[Sequence[int]],
    images_of_text: Sequence[Sequence[int]],
    ranks: dict[str, np.ndarray],
    thumbnail: Thumbnail,
) -> dict[str, Any]:
    """Queries of both directions and a similarity matrix of some pairs.

    Args:
        image_features: float32 [images, width], normalised.
        text_features: float32 [texts, width], normalised.
        texts: the distinct captions.
        texts_of_image, images_of_text: which belong together.
        ranks: rank of the best right answer of every query, by direction.
        thumbnail: image index -> uint8 [height, width, 3].

    Returns:
        `text_to_image`: list of {text, rank, found: [{image, score, right}]};
        `image_to_text`: list of {image, text, rank, found: [{text, score, right}]};
        `similarity`: {images, captions, similarity [n, n]}. An `image` is pixels.
    """
    to_image, to_text = [], []
    for query in spread(len(texts)):
        scores = text_features[query][None, :] @ image_features.T
        found = [
            {
                "image": thumbnail(int(i)),
                "score": float(scores[0, i]),
                "right": int(i) in images_of_text[query],
            }
            for i in best_candidates(scores, FOUND)[0]
        ]
        to_image.append({"text": texts[query], "rank": int(ranks["text_to_image"][query]), "found": found})
    for query in spread(len(texts_of_image)):
        scores = image_features[query][None, :] @ text_features.T
        found = [
            {"text": texts[t], "score": float(scores[0, t]), "right": int(t) in texts_of_image[query]}
            for t in best_candidates(scores, FOUND)[0]
        ]
        own = texts[texts_of_image[query][0]]
        rank = int(ranks["image_to_text"][query])
        to_text.append({"image": thumbnail(query), "text": own, "rank": rank, "found": found})
    similarity = _similarity(image_features, text_features, texts, images_of_text, thumbnail)
    return {"text_to_image": to_image, "image_to_text": to_text, "similarity": similarity}


def _similarity(
    image_features: np.ndarray,
    text_features: np.ndarray,
    texts: Sequence[str],
    images_of_text: Sequence[Sequence[int]],
    thumbnail: Thumbnail,
) -> dict[str, Any]:
    """Cosines of some pairs whose images and captions are all different, right answers on the diagonal."""
    pairs: dict[int, int] = {}
    for text in range(len(texts)):
        image = images_of_text[text][0]
        if image not in pairs:
            pairs[image] = text
        if len(pairs) == PAIRS:
            break
    images, own = list(pairs), list(pairs.values())
    return {
        "images": [thumbnail(image) for image in images],
        "captions": [texts[text] for text in own],
        "similarity": image_features[images] @ text_features[own].T,
    }


def zeroshot_details(
    names: Sequence[str], labels: Sequence[Sequence[int]], predictions: np.ndarray, thumbnail: Thumbnail
) -> dict[str, Any]:
    """The confusion of the classes that are most often mistaken (of all, where they are few).

    Args:
        names: of the classes.
        labels: right classes of each image; the first one counts as its class.
        predictions: int [images].
        thumbnail: image index -> uint8 [height, width, 3].

    Returns:
        `classes`: indices shown; `names` of them; `counts`: int [shown, shown], rows are the right class;
        `other`: int [shown], predictions outside the classes shown; `accuracy` and `total` of each class
        shown; `pairs`: the most frequent mistakes {right, predicted, count, image}.
    """
    truth = np.array([own[0] for own in labels])
    hit = np.array([int(p) in own for p, own in zip(predictions, labels, strict=True)])
    mistakes = Counter((int(t), int(p)) for t, p, ok in zip(truth, predictions, hit, strict=True) if not ok)
    common = sorted(mistakes.items(), key=lambda item: (-item[1], item[0]))
    shown = sorted(_most_confused(len(names), common))
    place = {c: i for i, c in enumerate(shown)}
    counts = np.zeros((len(shown), len(shown) + 1), np.int64)
    for t, p, ok in zip(truth, predictions, hit, strict=True):
        if int(t) in place:
            counts[place[int(t)], place.get(int(t if ok else p), len(shown))] += 1
    totals = counts.sum(axis=1)
    pairs = []
    for (right, predicted), count in common[:QUERIES]:
        example = int(np.flatnonzero((truth == right) & (predictions == predicted))[0])
        found = {"right": names[right], "predicted": names[predicted], "count": count}
        pairs.append({**found, "image": thumbnail(example)})
    return {
        "classes": shown,
        "names": [names[c] for c in shown],
        "counts": counts[:, :-1],
        "other": counts[:, -1],
        "total": totals,
        "accuracy": np.diagonal(counts) / np.maximum(totals, 1),
        "all_classes": len(names),
        "pairs": pairs,
    }


def _most_confused(classes: int, common: Sequence[tuple[tuple[int, int], int]]) -> list[int]:
    """All classes when they fit, else those in the most frequent mistakes, filled up with the first."""
    if classes <= CONFUSIONS:
        return list(range(classes))
    chosen: dict[int, None] = {}
    for (right, predicted), _ in common:
        if len(chosen.keys() | {right, predicted}) <= CONFUSIONS:
            chosen |= {right: None, predicted: None}
    for c in range(classes):
        if len(chosen) < CONFUSIONS:
            chosen.setdefault(c)
    return list(chosen)


def spread(count: int) -> list[int]:
    """Up to QUERIES indices spread evenly over `count`: the same ones every time, so runs can be compared."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, QUERIES))})
