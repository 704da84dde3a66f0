"""BLEU, ROUGE-L and CIDEr-D of captions, to the digit what COCO's evaluation code gives for the same tokens."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LONGEST = 4  # words of an n-gram, in BLEU and in CIDEr

# COCO's code adds these above and below BLEU's precisions, so that nothing is divided by zero. A score of a single
# caption is mostly made of them where no four words agree.
_ABOVE, _BELOW = 1e-15, 1e-9
_BETA = 1.2  # of ROUGE-L: recall weighs more
_SIGMA = 6.0  # of CIDEr-D's penalty for another length, in words


class Metric(NamedTuple):
    """A metric of a set of captions.

    Attributes:
        whole: of the set. For BLEU this is not the mean of `each`.
        each: of every caption, in the order given.
    """

    whole: float
    each: list[float]


def ngrams(words: Sequence[str], length: int) -> Counter:
    """How often each run of `length` words occurs."""
    return Counter(tuple(words[at : at + length]) for at in range(len(words) - length + 1))


def bleu(references: Sequence[Sequence[str]], captions: Sequence[str]) -> list[Metric]:
    """BLEU-1 to BLEU-4 with several references (Papineni et al. 2002), 0 to 1.

    Precisions are of the whole set; the length compared is that of the reference nearest in length, the shorter of
    two equally near.

    Args:
        references: tokens separated by white space, at least one reference per caption.
        captions: the same of what was written.

    Returns:
        For n = 1, 2, 3, 4.
    """
    counts = [_matches(own, caption) for own, caption in zip(references, captions, strict=True)]
    totals = np.sum([count for count, _ in counts], axis=0), np.sum([sizes for _, sizes in counts], axis=0)
    whole, each = _bleu(*totals), [_bleu(*own) for own in counts]
    return [Metric(whole[n], [own[n] for own in each]) for n in range(LONGEST)]


def _matches(references: Sequence[str], caption: str) -> tuple[np.ndarray, np.ndarray]:
    """(matched and all n-grams of a caption, int [2, 4]; its length and its nearest reference's, int [2])."""
    words, others = caption.split(), [reference.split() for reference in references]
    found = np.zeros((2, LONGEST), np.int64)
    for n in range(1, LONGEST + 1):
        own, most = ngrams(words, n), Counter()
        for other in others:
            most |= ngrams(other, n)
        found[:, n - 1] = (own & most).total(), own.total()
    nearest = min((len(other) for other in others), key=lambda size: (abs(size - len(words)), size))
    return found, np.array([len(words), nearest])


def _bleu(found: np.ndarray, sizes: np.ndarray) -> list[float]:
    """BLEU-1 to BLEU-4 from counts."""
    product, scores = 1.0, []
    for n, (right, total) in enumerate(found.T.tolist(), 1):
        product *= (right + _ABOVE) / (total + _BELOW)
        scores.append(product ** (1 / n))
    length, wanted = sizes.tolist()
    ratio = (length + _ABOVE) / (wanted + _BELOW)
    # The exponent may overflow to minus infinity: a caption without words scores 0.
    return [score * math.exp(1 - 1 / ratio) if ratio < 1 else score for score in scores]


def rouge(references: Sequence[Sequence[str]], captions: Sequence[str]) -> Metric:
    """ROUGE-L (Lin 2004, section 3) as COCO has it: F of the best precision and the best recall, 0 to 1.

    The two may come from different references. Arguments are those of `bleu`; a caption without words is one empty
    word here.
    """
    each = []
    for own, caption in zip(references, captions, strict=True):
        words, others = caption.split(" "), [reference.split(" ") for reference in own]
        common = [common_words(words, other) for other in others]
        precision = max(common) / len(words)
        recall = max(count / len(other) for count, other in zip(common, others, strict=True))
        weight = _BETA**2
        each.append((1 + weight) * precision * recall / (recall + weight * precision) if precision else 0.0)
    return Metric(float(np.mean(each)), each)


def common_words(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for at, other in enumerate(second, 1):
            before, row[at] = row[at], before + 1 if word == other else max(row[at], row[at - 1])
    return row[-1]


def cider(references: Sequence[Sequence[str]], captions: Sequence[str]) -> Metric:
    """CIDEr-D (Vedantam et al. 2015, section 4 and appendix), 0 to 10.

    How common an n-gram is is counted in the very references given: scores of a part of a set are not comparable with
    the whole set's, and those of a single image are 0.

    Arguments are those of `bleu`.
    """
    grams = [[_all_ngrams(reference) for reference in own] for own in references]
    images_with = Counter(
        gram for own in grams for gram in {gram for counts in own for gram in counts.keys()}
    )
    everything = math.log(len(grams))
    rarity = {gram: everything - math.log(count) for gram, count in images_with.items()}

    def weigh(counts: Counter) -> tuple[list[dict[tuple, float]], np.ndarray, int]:
        """Weights of a caption's n-grams by n, the lengths of these vectors, how many words it has."""
        weights: list[dict[tuple, float]] = [{} for _ in range(LONGEST)]
        for gram, count in counts.items():
            weights[len(gram) - 1][gram] = count * rarity.get(gram, everything)
        norms = np.array([math.sqrt(sum(weight**2 for weight in own.values())) for own in weights])
        return weights, norms, sum(count for gram, count in counts.items() if len(gram) == 1)

    each = []
    for own, caption in zip(grams, captions, strict=True):
        written = weigh(_all_ngrams(caption))
        each.append(10 * float(np.mean([_similarity(written, weigh(counts)) for counts in own])))
    return Metric(float(np.mean(each)), each)


def _all_ngrams(caption: str) -> Counter:
    words = caption.split()
    return sum((ngrams(words, n) for n in range(1, LONGEST + 1)), Counter())


def _similarity(written: tuple, reference: tuple) -> float:
    """Mean over n of the cosine, with weights clipped to the reference's, times the penalty for another length."""
    (own, norms, words), (others, other_norms, other_words) = written, reference
    cosines = []
    for n in range(LONGEST):
        shared = sum(
            min(weight, others[n].get(gram, 0.0)) * others[n].get(gram, 0.0)
            for gram, weight in own[n].items()
        )
        size = norms[n] * other_norms[n]
        cosines.append(shared / size if size else shared)
    return float(np.mean(cosines)) * math.exp(-((words - other_words) ** 2) / (2 * _SIGMA**2))
