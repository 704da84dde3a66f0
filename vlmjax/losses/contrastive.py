"""InfoNCE over the global batch, exact at any size: the matrix of similarities never exists."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, UInt32

from vlmjax.errors import RecipeError
from vlmjax.losses.choice import choose
from vlmjax.losses.layout import Plan
from vlmjax.losses.log_sums import LogSums, log_sums
from vlmjax.losses.tiles import Rows, Terms, as_rows


class Teacher(NamedTuple):
    """Soft targets: `weight * softmax(teacher similarity / temperature) + (1 - weight) * hard targets`.

    `image_embeds` and `text_embeds` are L2-normalised, `[batch, teacher_width]`, row i belonging to row i of
    the batch, and receive no gradient. `temperature` and `weight` are numbers or fp32 scalars.
    """

    image_embeds: Float[Array, "batch teacher_width"]
    text_embeds: Float[Array, "batch teacher_width"]
    temperature: Any
    weight: Any


class Memory(NamedTuple):
    """Keys of a momentum encoder: those of this batch in place of its own features, and a queue of earlier ones.

    L2-normalised; none receives a gradient. A queue holds for each row of the batch `slots` earlier examples, perhaps
    none. `queue_ids` are caption ids as in `positive_ids`, used with those alone.
    """

    image_keys: Float[Array, "batch width"]
    text_keys: Float[Array, "batch width"]
    image_queue: Float[Array, "batch slots width"]
    text_queue: Float[Array, "batch slots width"]
    queue_valid: Bool[Array, "batch slots"]
    queue_ids: UInt32[Array, "batch slots"]


class _Targets(NamedTuple):
    """What turns the sums of a query into its loss."""

    label_smoothing: float | int
    hard_negatives: float | int
    teacher_weight: Float[Array, ""] | None


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
    hard_negatives: float | int = 0.0,
    memory: Memory | None = None,
    form: str = "auto",
    feature_dtype: Any = jnp.float32,
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
      hard_negatives: strength b of reweighting: a negative counts in proportion to exp(b score), the weights of a
        query's negatives having mean 1. 0 counts all alike.
      memory: keys from a momentum encoder and a queue, as in MoCo: images look for their text among these texts.
      form: how the pairs are computed (vlmjax/losses/choice.py); the result is the same.
      feature_dtype: what similarities are computed from: float32, exactly, or bfloat16, several times faster on
        accelerators. Sums are fp32 either way.

    Returns:
      The loss, fp32, and `image_to_text_accuracy`, `text_to_image_accuracy`: the share of valid rows for
      which a positive scores higher than every negative.

    Raises:
      RecipeError: `label_smoothing` outside [0, 1), negative `hard_negatives`, or a form the mesh cannot have.

    Source: Radford et al. 2021, figure 3; soft targets as in Li et al. 2021 (ALBEF, 2107.07651), equations 6 and 7;
    reweighting as in Radenovic et al. 2023 (2301.02280), with alpha 1; queue as in He et al. 2020 (1911.05722).
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise RecipeError(f"label_smoothing = {label_smoothing}: expected a number in [0, 1), such as 0.1")
    if hard_negatives < 0.0:
        raise RecipeError(f"hard_negatives = {hard_negatives}: expected a number from 0, such as 0.25")
    dtype = jnp.dtype(feature_dtype)
    batch, width = image_embeds.shape
    if memory is not None and teacher is not None and teacher.image_embeds.shape[1] != width:
        raise RecipeError(
            f"the teacher's features have width {teacher.image_embeds.shape[1]}, those of the queue {width}: with a "
            "memory the teacher is the momentum encoder itself"
        )
    terms = make_terms(hard_negatives, positive_ids is not None, teacher is not None)
    slots = None if memory is None else memory.queue_valid.shape[1]
    choice = choose(form, batch, width, mesh, dtype=dtype, terms=terms, slots=slots)
    plan = Plan(choice.route, terms, choice.tile, both=memory is None, kernel=choice.kernel)
    ids = jnp.arange(batch, dtype=jnp.uint32) if positive_ids is None else positive_ids
    valid = jnp.ones(batch, bool) if valid is None else valid
    images = as_rows(image_embeds, ids, valid, dtype, teacher and teacher.image_embeds)
    texts = as_rows(text_embeds, ids, valid, dtype, teacher and teacher.text_embeds)
    scale = logit_scale.astype(jnp.float32)
    teacher_scale = jnp.float32(1.0)
    targets = _Targets(label_smoothing, hard_negatives, None)
    if teacher is not None:
        teacher_scale = 1.0 / jnp.asarray(teacher.temperature, jnp.float32)
        targets = targets._replace(teacher_weight=jnp.asarray(teacher.weight, jnp.float32))
    if memory is None:
        image_sums, text_sums = log_sums(plan, images, texts, scale, teacher_scale)
        directions = [(images, texts, texts, image_sums), (texts, images, images, text_sums)]
    else:
        directions = _against_memory(plan, images, texts, memory, scale, teacher_scale)
    losses, metrics = jnp.float32(0.0), {}
    count = jnp.maximum(valid.sum(dtype=jnp.float32), 1.0)
    names = ("image_to_text_accuracy", "text_to_image_accuracy")
    for name, (queries, pairs, keys, sums) in zip(names, directions, strict=True):
        of_query, right = _query_losses(queries, pairs, keys, sums, scale, targets)
        losses += jnp.where(valid, of_query, 0.0).sum()
        metrics[name] = jnp.sum(valid & right, dtype=jnp.float32) / count
    return losses / (2.0 * count), metrics


def make_terms(hard_negatives: float | int, several: bool, taught: bool) -> Terms:
    """The sums that a softmax with these options asks for."""
    return Terms(
        sharpness=(1.0 + hard_negatives, hard_negatives) if hard_negatives else (1.0,),
        several=several,
        taught=taught,
    )


def _against_memory(
    plan: Plan, images: Rows, texts: Rows, memory: Memory, scale: Array, teacher_scale: Array
) -> list[tuple[Rows, Rows, Rows, LogSums]]:
    """For both modalities: queries, the keys of their pairs, all keys they look among, and their sums over those."""
    slots = memory.queue_valid.shape[1]
    queue_ids = memory.queue_ids
    if (
        not plan.terms.several
    ):  # a row's only positive is its pair, so no id of the queue may be that of a row
        queue_ids = jnp.arange(len(images.ids) * slots, dtype=jnp.uint32).reshape(queue_ids.shape)
        queue_ids += np.uint32(len(images.ids))
    directions = []
    of_texts, of_images = (memory.text_keys, memory.text_queue), (memory.image_keys, memory.image_queue)
    for queries, others, (keys, queue) in ((images, texts, of_texts), (texts, images, of_images)):
        keys, queue = jax.lax.stop_gradient((keys, queue))
        pairs = as_rows(keys, others.ids, others.valid, queries.embeds.dtype, others.teacher)
        # What the momentum encoder said of earlier examples is in the queue, so that it teaches about them too.
        teacher = None if others.teacher is None else _with_slots(others.teacher, queue)
        bank = as_rows(
            _with_slots(keys, queue),
            _with_slots(others.ids, queue_ids),
            _with_slots(others.valid, memory.queue_valid),
            queries.embeds.dtype,
            teacher,
        )
        sums = log_sums(plan, queries, bank, scale, teacher_scale)[0]
        directions.append((queries, pairs, bank, sums))
    return directions


def _with_slots(rows: Array, slots: Array) -> Array:
    """[batch, ...] and [batch, slots, ...] as [batch * (1 + slots), ...]; each row's stay where the row is."""
    together = jnp.concatenate([rows[:, None], slots.astype(rows.dtype)], axis=1)
    return together.reshape(-1, *together.shape[2:])


def _query_losses(
    queries: Rows, pairs: Rows, keys: Rows, sums: LogSums, scale: Array, targets: _Targets
) -> tuple[Float[Array, " queries"], Bool[Array, " queries"]]:
    """Cross-entropy of each query, whose pair is the same row of `pairs`, and whether a positive scores best.

    That is log of the sum of exponentials minus the mean score under its targets; large numbers are subtracted from
    each other first, so that what is left keeps its digits.
    """
    pair = scale * jnp.sum(queries.embeds.astype(jnp.float32) * pairs.embeds.astype(jnp.float32), 1)
    count = keys.valid.sum(dtype=jnp.float32)
    positives = jnp.ones_like(pair) if sums.positive is None else sums.positive_count
    negative, best = _negatives(sums, count - positives, targets.hard_negatives), sums.best_negative
    if sums.positive is None:
        hard, best_positive = pair, pair
        losses = jax.nn.softplus(negative + (best - pair))
    else:
        hard, best_positive = sums.positive_mean, sums.best_positive
        losses = jax.nn.softplus(negative - sums.positive + (best - best_positive))
        losses += sums.positive + (best_positive - hard)
    wanted = hard
    if targets.label_smoothing:
        mean = keys.embeds.astype(jnp.float32).sum(0) / jnp.maximum(count, 1.0)
        everything = scale * jnp.matmul(
            queries.embeds.astype(jnp.float32), mean, precision=jax.lax.Precision.HIGHEST
        )
        wanted = wanted + targets.label_smoothing * (everything - wanted)
    if targets.teacher_weight is not None:
        wanted = wanted + targets.teacher_weight * (sums.taught - wanted)
    return losses + (hard - wanted), best_positive > best


def _negatives(sums: LogSums, count: Array, hardness: float | int) -> Array:
    """log of the sum over `count` negatives of exp(score - the best score), each with its weight."""
    if not hardness:
        return sums.negative[0]
    weighted = jnp.log(jnp.maximum(count, 1.0)) + sums.negative[0] - sums.negative[1]
    return jnp.where(count > 0.0, weighted, 0.0)  # without any the best score is EXCLUDED
