"""Logarithms of sums over all pairs of a global batch, and their gradients, without the matrix of pairs.

Both passes compute the matrix tile by tile. The backward pass computes each tile once more and uses it for the
gradients of both sides, so the whole costs 8 batch^2 width operations, and memory grows with the batch alone.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from vlmjax.losses import blocks, tpu_kernel
from vlmjax.losses.layout import Plan, padded
from vlmjax.losses.tiles import Rows, Slopes, Sums, Terms, merge, no_sums, reduce_stack
from vlmjax.losses.travel import on_every_device, visit_all

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogSums:
    """For each query (or key), over the keys (or queries) of the global batch; each fp32 [batch].

    `negative` holds log sum exp(k * (score - best_negative)) over negatives for each k of `Terms.sharpness`;
    `positive` the same over positives, with k = 1; `positive_mean` is their mean score; `taught` the mean score under
    the teacher's softmax, whose own log of sums is `teacher`. Gradients flow through the first four. The best scores
    and the rest are constants: apart from their maximum, sums of scores near 100 keep their digits.
    """

    negative: tuple[Array, ...]
    best_negative: Array
    positive: Array | None = None
    positive_mean: Array | None = None
    positive_count: Array | None = None
    best_positive: Array | None = None
    taught: Array | None = None
    teacher: Array | None = None


def log_sums(
    plan: Plan, queries: Rows, keys: Rows, scale: Array, teacher_scale: Array | float = 1.0
) -> tuple[LogSums, LogSums | None]:
    """Sums of queries over keys and, with `plan.both`, of keys over queries.

    Args:
      plan: its route says how rows lie over a mesh; both sides have the same number of rows on each device.
      queries: global arrays, features L2-normalised.
      keys: the same; without `plan.both` they receive no gradient.
      scale: multiplies the cosines, fp32 [].
      teacher_scale: multiplies the teacher's cosines.
    """
    fixed = (queries._replace(embeds=None), keys._replace(embeds=None), jnp.float32(teacher_scale))
    return _log_sums(plan, queries.embeds, keys.embeds, scale, fixed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_sums(plan: Plan, queries: Array, keys: Array, scale: Array, fixed: Tree) -> tuple:
    return _forward(plan, queries, keys, scale, fixed)[0]


def _forward(plan: Plan, queries: Array, keys: Array, scale: Array, fixed: Tree) -> tuple:
    rows = plan.route.rows

    def on_device(queries: Rows, keys: Rows, scale: Array, teacher_scale: Array) -> tuple:
        (queries, keys), tile, count = padded(plan, queries, keys)

        def visit(mine: Sums, block: Rows, theirs: Sums | None) -> tuple:
            if plan.kernel != "xla":
                return tpu_kernel.block_sums(
                    queries, mine, block, theirs, scale, plan.kernel == "interpreted"
                )
            return blocks.block_sums(tile, queries, mine, block, theirs, scale, teacher_scale, plan.terms)

        mine, theirs = visit_all(
            plan.route,
            keys,
            no_sums(len(queries.valid), plan.terms),
            lambda n: no_sums(n, plan.terms) if plan.both else None,
            visit,
            functools.partial(_collect_sums, plan),
            lambda a, b: merge(a, b, plan.terms),
        )
        cut = lambda tree, n: jax.tree.map(lambda x: x[:n], tree)  # noqa: E731
        return cut(mine, count[0]), cut(theirs, count[1])

    sides = (fixed[0]._replace(embeds=queries), fixed[1]._replace(embeds=keys))
    spread = on_every_device(plan.route, on_device, (rows, rows, PartitionSpec(), PartitionSpec()), rows)
    sums = spread(*sides, scale, fixed[2])
    result = tuple(None if s is None else _logs(s, plan.terms) for s in sums)
    return result, (queries, keys, scale, fixed, sums)


def _logs(sums: Sums, terms: Terms) -> LogSums:
    logs = LogSums(tuple(jnp.log(x) for x in sums.negative_sum), sums.negative_max)
    if terms.several:
        logs = dataclasses.replace(
            logs,
            positive=jnp.log(sums.positive_sum),
            positive_mean=sums.positive_total / jnp.maximum(sums.positive_count, 1.0),
            positive_count=sums.positive_count,
            best_positive=sums.positive_max,
        )
    if terms.taught:
        logs = dataclasses.replace(
            logs,
            taught=sums.teacher_total / sums.teacher_sum,
            teacher=sums.teacher_max + jnp.log(sums.teacher_sum),
        )
    return logs


def _backward(plan: Plan, kept: tuple, cotangents: tuple) -> tuple:
    queries, keys, scale, fixed, sums = kept
    rows = plan.route.rows
    slopes = tuple(
        None if side is None else _slopes(side, d, plan.terms)
        for side, d in zip(sums, cotangents, strict=True)
    )

    def on_device(queries: tuple, keys: tuple, scale: Array, teacher_scale: Array) -> tuple:
        (queries, keys), tile, count = padded(plan, queries, keys)
        width = queries[0].embeds.shape[1]

        def visit(mine: Array, block: tuple, theirs: Array | None) -> tuple:
            if plan.kernel != "xla":
                interpret = plan.kernel == "interpreted"
                return tpu_kernel.block_gradients(queries, mine, block, theirs, scale, interpret)
            return blocks.block_gradients(
                tile, queries, mine, block, theirs, scale, teacher_scale, plan.terms
            )

        zeros = lambda n: jnp.zeros((n, width), jnp.float32)  # noqa: E731
        mine, theirs = visit_all(
            plan.route,
            keys,
            zeros(len(queries[0].valid)),
            lambda n: zeros(n) if plan.both else None,
            visit,
            lambda x: x if x is None else lax.psum_scatter(x, plan.route.gather, tiled=True),
            lambda a, b: a if b is None else a + b,
        )
        return mine[: count[0]], None if theirs is None else theirs[: count[1]]

    sides = (
        (fixed[0]._replace(embeds=queries), slopes[0]),
        (fixed[1]._replace(embeds=keys), slopes[1]),
    )
    spread = on_every_device(plan.route, on_device, (rows, rows, PartitionSpec(), PartitionSpec()), rows)
    d_queries, d_keys = spread(*sides, scale, fixed[2])
    # Sum over pairs of slope times cosine, without another pass over the pairs.
    d_scale = jnp.sum(d_queries * queries.astype(jnp.float32))
    if d_keys is not None:
        d_keys = jnp.where(fixed[1].valid[:, None], scale * d_keys, 0.0).astype(keys.dtype)
    return (scale * d_queries).astype(queries.dtype), d_keys, d_scale, None


_log_sums.defvjp(_forward, _backward)


def _slopes(sums: Sums, d: LogSums, terms: Terms) -> Slopes:
    rates = (
        k * slope / total
        for k, slope, total in zip(terms.sharpness, d.negative, sums.negative_sum, strict=True)
    )
    slopes = Slopes(sums.negative_max, tuple(rates))
    if terms.several:
        slopes = slopes._replace(
            positive_max=sums.positive_max,
            positive_rate=d.positive / sums.positive_sum,
            positive_total_rate=d.positive_mean / jnp.maximum(sums.positive_count, 1.0),
        )
    if terms.taught:
        slopes = slopes._replace(teacher_max=sums.teacher_max, teacher_rate=d.taught / sums.teacher_sum)
    return slopes


def _collect_sums(plan: Plan, sums: Sums | None) -> Sums | None:
    """Of sums of the keys of a group of devices over the queries of each, those of this device's keys over all."""
    if sums is None:
        return None
    group = plan.route.gathered
    parts = jax.tree.map(lambda x: x.reshape(group, -1), sums)
    parts = jax.tree.map(lambda x: lax.all_to_all(x, plan.route.gather, 0, 0), parts)
    return reduce_stack(parts, plan.terms)
