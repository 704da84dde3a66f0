"""`rank`: how likely a model finds each of several answers; each prompt is read once."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlmjax.decode.beams import repeat_rows
from vlmjax.decode.generation import opened
from vlmjax.decode.language import Language, Params, prefill
from vlmjax.decode.prompts import bucket
from vlmjax.errors import UserError


class Ranking(NamedTuple):
    """Log-likelihoods of answers after their prompts; -inf for an answer that is all padding, or was not looked at.

    Attributes:
      sums: of all tokens of the answer.
      means: the same, per token.
    """

    sums: Float[Array, "batch candidates"]
    means: Float[Array, "batch candidates"]


def rank(
    model: nn.Module,
    params: Params,
    candidates_ids: Array | np.ndarray,
    candidates_mask: Array | np.ndarray | None = None,
    *,
    top: int | None = None,
    label_smoothing: float = 0.0,
    **inputs: Any,
) -> Ranking:
    """Score answers, token by token as a language model would write them.

    Args:
      model, params: as for `generate`.
      candidates_ids: answers, the same for every prompt [candidates, tokens] or each prompt's own [batch, candidates,
        tokens]. An end token that belongs to an answer is one of its tokens.
      candidates_mask: 1 on tokens; they come first, padding after them. None: no padding.
      top: look only at the answers of each prompt whose first token is likeliest, so many of them: of thousands of
        answers most need not be read (BLIP's VQA takes 128 of 3,128; salesforce/BLIP, models/blip_vqa.py). None: all.
      label_smoothing: mix so much of the mean over all tokens into each token's score, as BLIP ranks, by its own loss.
      inputs: of the prompts, as for `generate`.

    Raises:
      UserError: shapes that do not fit each other, padding before a token, `top` below 1.
    """
    ids = np.asarray(candidates_ids)
    mask = np.ones(ids.shape, np.int32) if candidates_mask is None else (np.asarray(candidates_mask) != 0)
    shapes = f"candidates_ids has shape {ids.shape}; give [candidates, tokens] or [batch, candidates, tokens]"
    if ids.ndim not in (2, 3) or 0 in ids.shape:
        raise UserError(shapes)
    if mask.shape != ids.shape:
        raise UserError(
            f"candidates_mask has shape {mask.shape}, candidates_ids {ids.shape}; give one of that shape"
        )
    if (np.diff(mask.astype(np.int32), axis=-1) > 0).any():
        raise UserError("candidates_mask has padding before a token; pad answers on the right")
    if top is not None and top < 1:
        raise UserError(f"top is {top}; give 1 or more, or leave it out to look at all answers")
    language, _, inputs = opened(model, params, ids.shape[-1], inputs)
    batch = inputs["input_ids"].shape[0]
    if ids.ndim == 3 and ids.shape[0] != batch:
        raise UserError(f"{shapes} with a batch of {batch}")
    more = [(0, 0), (0, 0), (0, bucket(ids.shape[-1]) - ids.shape[-1])]
    whole = (batch, *ids.shape[-2:])
    both = (np.pad(np.broadcast_to(x, whole).astype(np.int32), more) for x in (ids, mask))
    top = None if top is None or top >= ids.shape[-2] else top
    return Ranking(*_program(language, top, label_smoothing, params, inputs, *jax.device_put(tuple(both))))


def scores(
    language: Language,
    top: int | None,
    label_smoothing: float,
    params: Params,
    inputs: Mapping[str, Any],
    ids: Int[Array, "batch candidates tokens"],
    mask: Int[Array, "batch candidates tokens"],
) -> tuple[Float[Array, "batch candidates"], Float[Array, "batch candidates"]]:
    """What `rank` computes, traceable: sums and means of answers that come after prepared `inputs`."""
    cache, first, positions = prefill(language, params, inputs, ids.shape[2])
    if top is None:
        return _scored(language, label_smoothing, params, (cache, first, positions), ids, mask)
    likely = jnp.take_along_axis(jax.nn.log_softmax(first), ids[:, :, 0], axis=1)
    likely = jnp.where(mask[:, :, 0] != 0, likely, -jnp.inf)
    chosen = jax.lax.top_k(likely, top)[1]
    few = (jnp.take_along_axis(x, chosen[:, :, None], axis=1) for x in (ids, mask))
    found = _scored(language, label_smoothing, params, (cache, first, positions), *few)
    rows, blank = jnp.arange(ids.shape[0])[:, None], jnp.full(ids.shape[:2], -jnp.inf)
    sums, means = (blank.at[rows, chosen].set(scores) for scores in found)
    return sums, means


_program = jax.jit(scores, static_argnums=(0, 1, 2))


def _scored(
    language: Language,
    label_smoothing: float,
    params: Params,
    prompt: tuple[Any, Float[Array, "batch vocab"], Int[Array, " batch"]],
    ids: Int[Array, "batch candidates tokens"],
    mask: Int[Array, "batch candidates tokens"],
) -> tuple[Float[Array, "batch candidates"], Float[Array, "batch candidates"]]:
    """Sums and means of answers after prompts that have been read."""
    batch, count, tokens = ids.shape
    cache, first, positions = prompt
    cache = repeat_rows(cache, count)
    rows, real = ids.reshape(-1, tokens), mask.reshape(-1, tokens)
    places = jnp.repeat(positions, count)[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None, :]
    answers = language.embed(params, rows, places)._replace(segment_ids=real)
    hidden, _ = language.run(params, answers, cache)

    def score(given: tuple[Float[Array, "rows width"], Int[Array, " rows"]]) -> Float[Array, " rows"]:
        return _chosen(language.logits(params, given[0][:, None])[:, 0], given[1], label_smoothing)

    # Place by place: the scores of all places at once would be tokens times as large as those of one.
    later = jax.lax.map(score, (hidden[:, :-1].swapaxes(0, 1), rows[:, 1:].T))
    start = _chosen(jnp.repeat(first, count, axis=0), rows[:, 0], label_smoothing)
    gained = jnp.concatenate([start[None], later]).T
    sums = jnp.where(real != 0, gained, 0.0).sum(axis=1).reshape(batch, count)
    lengths = real.sum(axis=1).reshape(batch, count)
    sums = jnp.where(lengths > 0, sums, -jnp.inf)
    return sums, sums / jnp.maximum(lengths, 1).astype(jnp.float32)


def _chosen(
    logits: Float[Array, "rows vocab"], ids: Int[Array, " rows"], label_smoothing: float
) -> Float[Array, " rows"]:
    """Log-probability of one token per row, smoothed; NaN for one that the vocabulary lacks."""
    found = jnp.take_along_axis(logits, ids[:, None], axis=1, mode="fill", fill_value=jnp.nan)[:, 0]
    if label_smoothing:
        found = (1.0 - label_smoothing) * found + label_smoothing * logits.mean(axis=1)
    return found - jax.nn.logsumexp(logits, axis=1)
