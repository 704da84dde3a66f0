"""The sigmoid loss over the global batch: every pair is a yes or a no of its own (SigLIP).

Unlike a softmax it needs no sums before its slopes are known, so one pass over the pairs gives the loss and all
gradients, 6 batch^2 width operations, and keeps nothing for later but those gradients.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, UInt32

from vlmjax.losses.blocks import over_tiles
from vlmjax.losses.choice import choose
from vlmjax.losses.layout import Plan, padded
from vlmjax.losses.tiles import EXCLUDED, Rows, as_rows, known_pairs, product
from vlmjax.losses.travel import on_every_device, visit_all


def sigmoid(
    image_embeds: Float[Array, "batch width"],
    text_embeds: Float[Array, "batch width"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    *,
    mesh: Mesh | None = None,
    valid: Bool[Array, " batch"] | None = None,
    positive_ids: UInt32[Array, " batch"] | None = None,
    form: str = "auto",
    feature_dtype: Any = jnp.float32,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Binary cross-entropy of every pair of the global batch, summed over pairs, divided by the number of rows.

    Args:
      image_embeds: L2-normalised, any float dtype; with a mesh, rows lie over its axes `data` and `fsdp`.
      text_embeds: the same for the texts; row i is the pair of image i.
      logit_scale: multiplies the cosines.
      logit_bias: added to them; it starts near -10, since most pairs are a no.
      mesh, valid, positive_ids, form, feature_dtype: as in `info_nce`.

    Returns:
      The loss, fp32, and `image_to_text_accuracy`, `text_to_image_accuracy` as `info_nce` defines them, where the
      positive of a row is its own pair.

    Raises:
      RecipeError: a form the mesh cannot have.

    Source: Zhai et al. 2023 (SigLIP, arXiv 2303.15343), algorithm 1; their section 3.3 describes the blocks.
    """
    batch, width = image_embeds.shape
    dtype = jnp.dtype(feature_dtype)
    choice = choose(form, batch, width, mesh, dtype=dtype, terms=None)
    plan = Plan(choice.route, tile=choice.tile)
    ids = jnp.arange(batch, dtype=jnp.uint32) if positive_ids is None else positive_ids
    valid = jnp.ones(batch, bool) if valid is None else valid
    images, texts = (as_rows(x, ids, valid, dtype) for x in (image_embeds, text_embeds))
    scale, bias = logit_scale.astype(jnp.float32), logit_bias.astype(jnp.float32)
    fixed = (ids, valid)
    total, best = _pairs(plan, images.embeds, texts.embeds, scale, bias, fixed)
    count = jnp.maximum(valid.sum(dtype=jnp.float32), 1.0)
    own = scale * jnp.sum(images.embeds.astype(jnp.float32) * texts.embeds.astype(jnp.float32), 1) + bias
    names = ("image_to_text_accuracy", "text_to_image_accuracy")
    right = (jnp.sum(valid & (own > other), dtype=jnp.float32) / count for other in best)
    return total / count, dict(zip(names, right, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pairs(plan: Plan, images: Array, texts: Array, scale: Array, bias: Array, fixed: tuple) -> tuple:
    """(sum of the losses of all pairs, best negative of each image and of each text)."""
    return _forward(plan, images, texts, scale, bias, fixed)[0]


def _forward(plan: Plan, images: Array, texts: Array, scale: Array, bias: Array, fixed: tuple) -> tuple:
    rows, everywhere = plan.route.rows, PartitionSpec()

    def on_device(queries: Rows, keys: Rows, scale: Array, bias: Array) -> tuple:
        (queries, keys), tile, count = padded(plan, queries, keys)
        width = queries.embeds.shape[1]

        def empty(n: int) -> tuple:
            """Gradient of the features, best negative."""
            return jnp.zeros((n, width), jnp.float32), jnp.full(n, EXCLUDED, jnp.float32)

        def visit(mine: tuple, block: Rows, theirs: tuple) -> tuple:
            return over_tiles(
                tile, queries, mine, block, theirs, functools.partial(_tile, scale=scale, bias=bias)
            )

        n = len(queries.ids)
        zero = jnp.zeros(n, jnp.float32)
        mine, theirs = visit_all(
            plan.route,
            keys,
            (*empty(n), zero, zero),
            empty,
            visit,
            functools.partial(_collect, plan),
            lambda a, b: (a[0] + b[0], jnp.maximum(a[1], b[1])),
        )
        return [x[: count[0]] for x in mine], [x[: count[1]] for x in theirs]

    sides = [Rows(embeds, *fixed) for embeds in (images, texts)]
    spread = on_every_device(plan.route, on_device, (rows, rows, everywhere, everywhere), rows)
    (d_images, best_text, losses, slopes), (d_texts, best_image) = spread(*sides, scale, bias)
    d_scale = jnp.sum(d_images * images.astype(jnp.float32))
    d_images, d_texts = ((scale * d).astype(x.dtype) for d, x in ((d_images, images), (d_texts, texts)))
    return (losses.sum(), (best_text, best_image)), (d_images, d_texts, d_scale, slopes.sum())


def _backward(plan: Plan, gradients: tuple, cotangents: tuple) -> tuple:
    slope = cotangents[0]
    return (*((slope * x.astype(jnp.float32)).astype(x.dtype) for x in gradients), None)


_pairs.defvjp(_forward, _backward)


def _tile(
    rows: Rows, row_state: tuple, columns: Rows, column_state: tuple, *, scale: Array, bias: Array
) -> tuple:
    """One tile: losses, their slopes, and the gradients of both sides."""
    scores = scale * product(rows.embeds, columns.embeds, 1, 1) + bias
    positive, known = known_pairs(rows, columns)
    signed = jnp.where(positive, -scores, scores)
    losses = jnp.where(known, jax.nn.softplus(signed), 0.0)
    slopes = jnp.where(known, jnp.where(positive, -1.0, 1.0) * jax.nn.sigmoid(signed), 0.0)
    negatives = jnp.where(known & ~positive, scores, EXCLUDED)
    d_rows, row_best, row_loss, row_slope = row_state
    d_columns, column_best = column_state
    gradient = slopes.astype(rows.embeds.dtype)
    d_rows = d_rows + product(gradient, columns.embeds, 1, 0)
    d_columns = d_columns + product(gradient, rows.embeds, 0, 0)
    row_state = (
        d_rows,
        jnp.maximum(row_best, negatives.max(1)),
        row_loss + losses.sum(1),
        row_slope + slopes.sum(1),
    )
    return row_state, (d_columns, jnp.maximum(column_best, negatives.max(0)))


def _collect(plan: Plan, state: tuple) -> tuple:
    """Of what a group of devices found for gathered keys, the part for this device's keys, over the group."""
    gradient, best = state
    axes = plan.route.gather
    gradient = lax.psum_scatter(gradient, axes, tiled=True)
    best = lax.all_to_all(best.reshape(plan.route.gathered, -1), axes, 0, 0).max(0)
    return gradient, best
