"""The arithmetic of one tile of the similarity matrix: what it adds to the sums of its rows and of its columns.

A tile is computed once and serves both directions: its rows are images that look for their text, its columns texts that
look for their image. Nothing here knows where the rows came from, so every form of the loss (one device, gathered, a
ring) shares these definitions.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

# Finite, so that a row with nothing to compare with gives a finite number that its weight 0 then removes.
EXCLUDED = -1e30


class Rows(NamedTuple):
    """What a tile must know of its rows, or of its columns: arrays of equal length."""

    embeds: Array  # [rows, width], zero where not valid
    ids: Array  # uint32 [rows]; a row and a column with equal ids are positives of each other
    valid: Array  # bool [rows]
    teacher: Array | None = None  # [rows, teacher_width], for soft targets


def as_rows(embeds: Array, ids: Array, valid: Array, dtype: Any, teacher: Array | None = None) -> Rows:
    """Rows that do not count become zero: what they held (NaN included) reaches neither value nor gradient."""
    embeds = jnp.where(valid[:, None], embeds.astype(dtype), jnp.zeros((), dtype))
    if teacher is not None:
        teacher = jnp.where(valid[:, None], jax.lax.stop_gradient(teacher).astype(jnp.float32), 0.0)
    return Rows(embeds, ids, valid, teacher)


class Terms(NamedTuple):
    """Which sums a loss asks for; static."""

    sharpness: tuple[float, ...] = (1.0,)  # log of the sum of exp(k * score) over negatives, for each k
    several: bool = False  # also sums over positives, which may be more than the row's own pair
    taught: bool = False  # also the mean score under a teacher's softmax


class Sums(NamedTuple):
    """Running sums of rows over the keys they have met, each fp32 [rows].

    Exponentials are relative to the running maximum, so that scores of 100 do not overflow, and the sums of two sets of
    keys combine into those of their union.
    """

    negative_max: Array
    negative_sum: tuple[Array, ...]  # of exp(k * (score - negative_max)), one for each sharpness
    positive_max: Array | None = None
    positive_sum: Array | None = None  # of exp(score - positive_max)
    positive_total: Array | None = None  # of scores
    positive_count: Array | None = None
    teacher_max: Array | None = None
    teacher_sum: Array | None = None  # of exp(teacher's score - teacher_max)
    teacher_total: Array | None = None  # of those exponentials times the score


class Slopes(NamedTuple):
    """What the backward pass knows of rows, each fp32 [rows]: d loss / d score is rate * exp(k * (score - maximum)).

    Rates hold the loss's slope, over the row's sum. Relative to the maximum the exponentials keep their digits.
    """

    negative_max: Array
    negative_rate: tuple[Array, ...]
    positive_max: Array | None = None
    positive_rate: Array | None = None
    positive_total_rate: Array | None = None
    teacher_max: Array | None = None
    teacher_rate: Array | None = None


def no_sums(rows: int, terms: Terms) -> Sums:
    """Sums of rows that have met no key."""
    zero, lowest = jnp.zeros(rows, jnp.float32), jnp.full(rows, EXCLUDED, jnp.float32)
    sums = Sums(lowest, (zero,) * len(terms.sharpness))
    if terms.several:
        sums = sums._replace(positive_max=lowest, positive_sum=zero, positive_total=zero, positive_count=zero)
    if terms.taught:
        sums = sums._replace(teacher_max=lowest, teacher_sum=zero, teacher_total=zero)
    return sums


def product(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Matrix product over one axis of each, accumulated in fp32; fp32 factors are multiplied exactly.

    At scale 100 the default of accelerators for fp32 (bf16 or tf32 passes) would be off by 1e-2. Factors that are
    bfloat16 have no more digits than one pass multiplies.
    """
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=jnp.float32)


def tile_sums(
    rows: Rows, columns: Rows, scale: Array, teacher_scale: Array, terms: Terms, both: bool
) -> tuple[Sums, Sums | None]:
    """The sums of the rows over the columns and, with `both`, of the columns over the rows."""
    scores = scale * product(rows.embeds, columns.embeds, 1, 1)
    positive, known = known_pairs(rows, columns)
    teacher = None
    if terms.taught:
        teacher = teacher_scale * product(rows.teacher, columns.teacher, 1, 1)
        teacher = jnp.where(known, teacher, EXCLUDED)
    masked = (scores, known & ~positive, known & positive, teacher, terms)
    return _sums_along(1, *masked), _sums_along(0, *masked) if both else None


def known_pairs(rows: Rows, columns: Rows) -> tuple[Array, Array]:
    """(pairs with equal ids, pairs of two valid rows), each bool [rows, columns]."""
    return rows.ids[:, None] == columns.ids[None, :], rows.valid[:, None] & columns.valid[None, :]


def _sums_along(
    axis: int, scores: Array, negative: Array, positive: Array, teacher: Array | None, terms: Terms
) -> Sums:
    """Sums of a tile along one of its axes."""

    def relative(values: Array, maximum: Array) -> Array:
        return values - jnp.expand_dims(maximum, axis)

    negatives = jnp.where(negative, scores, EXCLUDED)
    best = negatives.max(axis)
    sums = Sums(best, tuple(jnp.exp(k * relative(negatives, best)).sum(axis) for k in terms.sharpness))
    if terms.several:
        positives = jnp.where(positive, scores, EXCLUDED)
        best = positives.max(axis)
        sums = sums._replace(
            positive_max=best,
            positive_sum=jnp.exp(relative(positives, best)).sum(axis),
            positive_total=jnp.where(positive, scores, 0.0).sum(axis),
            positive_count=positive.sum(axis, dtype=jnp.float32),
        )
    if teacher is not None:
        best = teacher.max(axis)
        weights = jnp.exp(relative(teacher, best))
        sums = sums._replace(
            teacher_max=best, teacher_sum=weights.sum(axis), teacher_total=(weights * scores).sum(axis)
        )
    return sums


def merge(a: Sums | None, b: Sums | None, terms: Terms) -> Sums | None:
    """The sums over the union of the keys of `a` and of `b`."""
    if a is None or b is None:
        return a if b is None else b
    return reduce_stack(jax.tree.map(lambda *x: jnp.stack(x), a, b), terms)


def reduce_stack(parts: Sums, terms: Terms) -> Sums:
    """The sums over the union of keys of a stack of sums, whose leaves are [parts, rows]."""

    def rescaled(sums: Array, maximum: Array, best: Array, sharpness: float = 1.0) -> Array:
        return (sums * jnp.exp(sharpness * (maximum - best[None]))).sum(0)

    best = parts.negative_max.max(0)
    total = Sums(
        best,
        tuple(
            rescaled(s, parts.negative_max, best, k)
            for s, k in zip(parts.negative_sum, terms.sharpness, strict=True)
        ),
    )
    if terms.several:
        best = parts.positive_max.max(0)
        total = total._replace(
            positive_max=best,
            positive_sum=rescaled(parts.positive_sum, parts.positive_max, best),
            positive_total=parts.positive_total.sum(0),
            positive_count=parts.positive_count.sum(0),
        )
    if terms.taught:
        best = parts.teacher_max.max(0)
        total = total._replace(
            teacher_max=best,
            teacher_sum=rescaled(parts.teacher_sum, parts.teacher_max, best),
            teacher_total=rescaled(parts.teacher_total, parts.teacher_max, best),
        )
    return total


def tile_gradient(
    rows: Rows,
    row_slopes: Slopes,
    columns: Rows,
    column_slopes: Slopes | None,
    scale: Array,
    teacher_scale: Array,
    terms: Terms,
) -> Array:
    """d loss / d score of a tile, fp32 [rows, columns], computed anew from the features.

    Without `column_slopes` the columns are a bank that only the rows look at.
    """
    scores = scale * product(rows.embeds, columns.embeds, 1, 1)
    positive, known = known_pairs(rows, columns)
    sides = [(row_slopes, 1)] + ([] if column_slopes is None else [(column_slopes, 0)])
    teacher = teacher_scale * product(rows.teacher, columns.teacher, 1, 1) if terms.taught else None
    total = jnp.zeros_like(scores)
    for slopes, axis in sides:
        of = functools.partial(jnp.expand_dims, axis=axis)
        above = scores - of(slopes.negative_max)
        negatives = sum(
            of(rate) * jnp.exp(k * above)
            for k, rate in zip(terms.sharpness, slopes.negative_rate, strict=True)
        )
        total += jnp.where(known & ~positive, negatives, 0.0)
        if terms.several:
            positives = of(slopes.positive_rate) * jnp.exp(scores - of(slopes.positive_max))
            total += jnp.where(known & positive, positives + of(slopes.positive_total_rate), 0.0)
        if terms.taught:
            taught = of(slopes.teacher_rate) * jnp.exp(teacher - of(slopes.teacher_max))
            total += jnp.where(known, taught, 0.0)
    return total
