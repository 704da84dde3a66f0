"""InfoNCE over the global batch: each device scores its own rows against everybody's, and nothing larger."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, UInt32

from vlmjax.errors import RecipeError
from vlmjax.sharding.mesh import BATCH_AXES

# Finite, so that a row with nothing to compare with gives a finite number that its weight 0 then removes.
_EXCLUDED = float(jnp.finfo(jnp.float32).min)


class Teacher(NamedTuple):
    """Soft targets: `weight * softmax(teacher similarity / temperature) + (1 - weight) * hard targets`.

    `image_embeds` and `text_embeds` are L2-normalised, `[batch, teacher_width]`, row i belonging to row i of
    the batch, and receive no gradient. `temperature` and `weight` are numbers or fp32 scalars.
    """

    image_embeds: Float[Array, "batch teacher_width"]
    text_embeds: Float[Array, "batch teacher_width"]
    temperature: Any
    weight: Any


class _Side(NamedTuple):
    """One modality of some rows, with what decides which keys are a query's positives."""

    embeds: Float[Array, "rows width"]
    teacher: Float[Array, "rows teacher_width"] | None
    ids: UInt32[Array, " rows"]
    valid: Bool[Array, " rows"]


class _Scalars(NamedTuple):
    """What every device knows alike."""

    logit_scale: Float[Array, ""]
    teacher_scale: Float[Array, ""] | None
    teacher_weight: Float[Array, ""] | None


class _TileStatistics(NamedTuple):
    """All that the loss of a query needs to know about a set of keys, each `[queries]` in fp32.

    Every field is a maximum, a sum, or a sum relative to a maximum, so the statistics of two sets of keys
    combine into those of their union: a streaming form folds tiles and changes nothing else.
    """

    best_positive: Float[Array, " queries"]
    best_negative: Float[Array, " queries"]
    exp_sum: Float[Array, " queries"]  # relative to the larger of the two bests
    positive_sum: Float[Array, " queries"]
    positive_count: Float[Array, " queries"]
    key_sum: Float[Array, " queries"]
    key_count: Float[Array, ""]
    teacher_exp_sum: Float[Array, " queries"] | None
    teacher_score_sum: Float[Array, " queries"] | None  # sum of teacher weight times student score


def info_nce(
    image_embeds: Float[Array, "batch width"],
    text_embeds: Float[Array, "batch width"],
    logit_scale: Float[Array, ""],
    *,
    mesh: Mesh | None = None,
    valid: Bool[Array, " batch"] | None = None,
    positive_ids: UInt32[Array, " batch"] | None = None,
    label_smoothing: float | int = 0.0,
    teacher: Teacher | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Symmetric cross-entropy between images and texts over the global batch.

    Args:
      image_embeds: L2-normalised, any float dtype; with a mesh, rows lie over its axes `data` and `fsdp`.
      text_embeds: the same for the texts; row i is the pair of image i.
      logit_scale: multiplies the cosines (1 / temperature, already exponentiated).
      mesh: the mesh the rows lie on. None computes the same on one device.
      valid: rows that take part, as query and as key; default all. The loss is their mean, 0 for none.
      positive_ids: rows with equal ids are positives of each other and share the target mass evenly; default
        every row has one positive, its pair.
      label_smoothing: share of the hard target spread evenly over all valid keys, in [0, 1).
      teacher: soft targets, mixed with the hard ones.

    Returns:
      The loss, fp32, and `image_to_text_accuracy`, `text_to_image_accuracy`: the share of valid rows for
      which a positive scores higher than every negative.

    Raises:
      RecipeError: `label_smoothing` outside [0, 1).

    Source: Radford et al. 2021, figure 3; soft targets as in Li et al. 2021 (ALBEF), equations 6 and 7.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise RecipeError(f"label_smoothing = {label_smoothing}: expected a number in [0, 1), such as 0.1")
    batch = image_embeds.shape[0]
    ids = jnp.arange(batch, dtype=jnp.uint32) if positive_ids is None else positive_ids
    valid = jnp.ones(batch, bool) if valid is None else valid
    scalars = _Scalars(logit_scale.astype(jnp.float32), None, None)
    images = _side(image_embeds, teacher and teacher.image_embeds, ids, valid)
    texts = _side(text_embeds, teacher and teacher.text_embeds, ids, valid)
    if teacher is not None:
        temperature = jnp.asarray(teacher.temperature, jnp.float32)
        weight = jnp.asarray(teacher.weight, jnp.float32)
        scalars = scalars._replace(teacher_scale=1.0 / temperature, teacher_weight=weight)
    if mesh is None:
        return _device_loss(images, texts, scalars, label_smoothing=label_smoothing, axes=())
    rows, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    device_loss = functools.partial(_device_loss, label_smoothing=label_smoothing, axes=BATCH_AXES)
    sharded = jax.shard_map(
        device_loss, mesh=mesh, in_specs=(rows, rows, everywhere), out_specs=(everywhere, everywhere)
    )
    return sharded(images, texts, scalars)


def _side(embeds: Array, teacher: Array | None, ids: Array, valid: Array) -> _Side:
    """Upcasts first, so that products, sums and the reduction of gradients over devices are all fp32.

    Rows that do not count become zero: what they held (NaN included) reaches neither value nor gradient.
    """
    embeds = jnp.where(valid[:, None], embeds.astype(jnp.float32), 0.0)
    if teacher is not None:
        teacher = jnp.where(valid[:, None], jax.lax.stop_gradient(teacher).astype(jnp.float32), 0.0)
    return _Side(embeds, teacher, ids, valid)


def _device_loss(
    images: _Side, texts: _Side, scalars: _Scalars, *, label_smoothing: float | int, axes: tuple[str, ...]
) -> tuple[Array, dict[str, Array]]:
    """Both directions for the rows of this device against the keys of all; the sums go over `axes`."""
    image_loss, image_right = _direction(images, _gather(texts, axes), scalars, label_smoothing)
    text_loss, text_right = _direction(texts, _gather(images, axes), scalars, label_smoothing)
    sums = (image_loss + text_loss, image_right, text_right, images.valid.sum(dtype=jnp.float32))
    loss, image_right, text_right, count = jax.lax.psum(sums, axes) if axes else sums
    count = jnp.maximum(count, 1.0)
    metrics = {"image_to_text_accuracy": image_right / count, "text_to_image_accuracy": text_right / count}
    return loss / (2.0 * count), metrics


def _gather(side: _Side, axes: tuple[str, ...]) -> _Side:
    """The rows of all devices. Its transpose sums and scatters, which is the gradient of the keys."""
    if not axes:
        return side
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), side)


def _direction(
    queries: _Side, keys: _Side, scalars: _Scalars, label_smoothing: float | int
) -> tuple[Array, Array]:
    """Sum over the valid queries of their loss, and how many found a positive first."""
    tile = _tile_statistics(queries, keys, scalars)
    losses = _query_losses(tile, scalars, label_smoothing)
    right = tile.best_positive > tile.best_negative
    return (
        jnp.where(queries.valid, losses, 0.0).sum(),
        jnp.sum(queries.valid & right, dtype=jnp.float32),
    )


def _is_positive(queries: _Side, keys: _Side) -> Bool[Array, "queries keys"]:
    """The one definition of the hard targets, for any tile of queries and keys."""
    return (queries.ids[:, None] == keys.ids[None, :]) & keys.valid[None, :]


def _similarity(
    queries: Float[Array, "queries width"], keys: Float[Array, "keys width"], scale: Float[Array, ""]
) -> Float[Array, "queries keys"]:
    # Full fp32 products: at scale 100 the default of accelerators (bf16 or tf32 passes) is off by 1e-2, and
    # the loss is too small a part of a step for the cheaper product to show.
    product = jax.lax.dot_general(
        queries,
        keys,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return scale * product


def _tile_statistics(queries: _Side, keys: _Side, scalars: _Scalars) -> _TileStatistics:
    """What the queries need to know about these keys."""
    is_key, positive = keys.valid[None, :], _is_positive(queries, keys)
    scores = _similarity(queries.embeds, keys.embeds, scalars.logit_scale)
    best_positive = jax.lax.stop_gradient(jnp.where(positive, scores, _EXCLUDED).max(1))
    best_negative = jax.lax.stop_gradient(jnp.where(is_key & ~positive, scores, _EXCLUDED).max(1))
    best = jnp.maximum(best_positive, best_negative)
    statistics = _TileStatistics(
        best_positive=best_positive,
        best_negative=best_negative,
        exp_sum=jnp.exp(jnp.where(is_key, scores, _EXCLUDED) - best[:, None]).sum(1),
        positive_sum=jnp.where(positive, scores, 0.0).sum(1),
        positive_count=positive.sum(1, dtype=jnp.float32),
        key_sum=jnp.where(is_key, scores, 0.0).sum(1),
        key_count=keys.valid.sum(dtype=jnp.float32),
        teacher_exp_sum=None,
        teacher_score_sum=None,
    )
    if queries.teacher is None:
        return statistics
    weights = _similarity(queries.teacher, keys.teacher, scalars.teacher_scale)
    weights = jnp.where(is_key, weights, _EXCLUDED)
    weights = jnp.exp(weights - weights.max(1, keepdims=True))
    return statistics._replace(teacher_exp_sum=weights.sum(1), teacher_score_sum=(weights * scores).sum(1))


def _query_losses(
    tile: _TileStatistics, scalars: _Scalars, label_smoothing: float | int
) -> Float[Array, " queries"]:
    """Cross-entropy of each query: log of the sum of exponentials minus the mean score under its targets."""
    wanted = tile.positive_sum / jnp.maximum(tile.positive_count, 1.0)
    if label_smoothing:
        everything = tile.key_sum / jnp.maximum(tile.key_count, 1.0)
        wanted = (1.0 - label_smoothing) * wanted + label_smoothing * everything
    if scalars.teacher_weight is not None:
        taught = tile.teacher_score_sum / tile.teacher_exp_sum
        wanted = (1.0 - scalars.teacher_weight) * wanted + scalars.teacher_weight * taught
    best = jnp.maximum(tile.best_positive, tile.best_negative)
    # The large numbers are subtracted from each other first: what is left is small and keeps its digits.
    return (best - wanted) + jnp.log(tile.exp_sum)
