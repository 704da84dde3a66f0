"""Where the best right answer stands in a scored list: the one rule under top-k, recall and mean rank."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vlmjax.errors import NonFiniteError

# Scores of one block of queries against every candidate: 16 M floats are 64 MiB.
BLOCK_ELEMENTS = 1 << 24


class Ranks(NamedTuple):
    """Rank (from 0) of each query's best right candidate, as int64 [queries], under three readings of a tie.

    `stable` is the one every metric uses: candidates scoring strictly more, plus candidates with the equal
    score and a smaller index. `optimistic` lets the right one win every tie, `pessimistic` lets it lose to
    every wrong candidate with the same score; where those two agree no tie mattered.
    """

    stable: np.ndarray
    optimistic: np.ndarray
    pessimistic: np.ndarray


def ranks_of_positives(scores: np.ndarray, positives: Sequence[Sequence[int]]) -> Ranks:
    """Rank of the best right candidate of every query.

    Args:
        scores: float [queries, candidates], larger is better, all finite.
        positives: for each query the indices of its right candidates, at least one.

    Raises:
        NonFiniteError: a score is NaN or infinite. A NaN compares as smaller than everything, so a broken
            model would otherwise score 100 %.
        ValueError: a query has no right candidate.
    """
    if not np.isfinite(scores).all():
        raise NonFiniteError("similarity scores are not finite: the model's embeddings hold NaN or infinity")
    counts = np.fromiter((len(p) for p in positives), np.int64, len(positives))
    if len(positives) != len(scores) or (counts == 0).any():
        raise ValueError(f"{len(scores)} queries need as many non-empty lists of right candidates")
    query = np.repeat(np.arange(len(scores)), counts)
    candidate = np.concatenate([np.asarray(p, np.int64) for p in positives] or [np.zeros(0, np.int64)])
    if not len(query):
        return Ranks(*(np.zeros(0, np.int64) for _ in range(3)))

    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    own = scores[query, candidate]
    best = np.maximum.reduceat(own, starts)
    at_best = own == best[query]
    first = np.minimum.reduceat(np.where(at_best, candidate, scores.shape[1]), starts)

    greater = (scores > best[:, None]).sum(axis=1)
    equal = scores == best[:, None]
    before = (equal & (np.arange(scores.shape[1])[None, :] < first[:, None])).sum(axis=1)
    # Listing a positive twice must not count it twice.
    hits = zip(positives, np.split(at_best, starts[1:]), strict=True)
    own_equal = np.array([len(set(np.asarray(p)[hit])) for p, hit in hits])
    return Ranks(greater + before, greater, greater + equal.sum(axis=1) - own_equal)


def blocked_ranks(
    queries: np.ndarray,
    candidates: np.ndarray,
    positives: Sequence[Sequence[int]],
    *,
    block: int | None = None,
    rescore: Callable[[range, np.ndarray], np.ndarray] | None = None,
) -> Ranks:
    """`ranks_of_positives` of `queries @ candidates.T` in float32, never holding the whole similarity matrix.

    Args:
        queries: float [queries, width].
        candidates: float [candidates, width].
        positives: for each query the indices of its right candidates.
        block: queries scored at a time; by default as many as keep a block under 64 MiB.
        rescore: from the rows and scores of a block to other scores.
    """
    parts = []
    for rows, scores in score_blocks(queries, candidates, block=block):
        scores = rescore(rows, scores) if rescore else scores
        parts.append(ranks_of_positives(scores, positives[rows.start : rows.stop]))
    if not parts:
        return Ranks(*(np.zeros(0, np.int64) for _ in range(3)))
    return Ranks(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def score_blocks(
    queries: np.ndarray, candidates: np.ndarray, *, block: int | None = None
) -> Iterator[tuple[range, np.ndarray]]:
    """Yield (rows, float32 scores [rows, candidates]) until every query was scored once."""
    queries, candidates = np.asarray(queries, np.float32), np.asarray(candidates, np.float32)
    block = block or max(1, BLOCK_ELEMENTS // max(1, len(candidates)))
    for start in range(0, len(queries), block):
        rows = range(start, min(start + block, len(queries)))
        yield rows, queries[rows.start : rows.stop] @ candidates.T


def best_candidates(scores: np.ndarray, k: int) -> np.ndarray:
    """The k best candidates of each query, best first, equal scores by smaller index: int64 [queries, k]."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def chance_of_hit(candidates: int, positives: np.ndarray, k: int) -> float:
    """Expected share of queries with a right candidate among k drawn at random without replacement.

    Args:
        candidates: how many candidates each query chooses from.
        positives: int [queries], how many of them are right for each query.
    """
    positives = np.asarray(positives, np.int64)
    if not len(positives):
        return 0.0
    miss = np.ones(len(positives))
    for drawn in range(min(k, candidates)):
        miss *= np.clip(candidates - positives - drawn, 0, None) / (candidates - drawn)
    return float(np.mean(1.0 - miss))
