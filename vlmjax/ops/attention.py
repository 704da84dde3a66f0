"""Scaled dot-product attention, the one place where scores are masked and softened."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    *,
    mask: Bool[Array, "#batch #heads #queries keys"] | None = None,
    bias: Float[Array, "#batch #heads #queries keys"] | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """Mix `v` with the weights softmax(scale * q.k + bias), scores and softmax in float32.

    `mask` is True where a query may look. `causal` also hides later keys; with fewer queries than keys the
    queries are the last ones. `scale` is head_dim**-0.5 unless given. A query that may look nowhere gives
    zeros and passes no gradient (as torch's scaled_dot_product_attention does), never NaN.
    `dropout_rate` above zero needs `dropout_key` and drops weights, keeping their expectation.
    The result has the dtype of `v`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if causal:
        mask = combine_masks(mask, causal_mask(q.shape[1], k.shape[1]))
    if mask is not None:
        # The lowest finite number, not -inf: a row of only -inf makes the softmax and its gradient NaN.
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if dropout_rate > 0.0:
        if dropout_key is None:
            raise ValueError(f"attention with dropout_rate={dropout_rate} needs a dropout_key")
        kept = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights.shape)
        weights = jnp.where(kept, weights / (1.0 - dropout_rate), 0.0)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)
    if mask is not None:
        looks = mask.any(axis=-1).swapaxes(1, 2)[..., None]
        out = jnp.where(looks, out, jnp.zeros((), out.dtype))
    return out


def causal_mask(queries: int, keys: int) -> Bool[Array, "1 1 queries keys"]:
    """True where key j is not later than query i; the last query stands at the last key."""
    position = jnp.arange(queries)[:, None] + (keys - queries)
    return (jnp.arange(keys)[None, :] <= position)[None, None]


def padding_mask(
    attention_mask: Int[Array, "batch keys"] | Bool[Array, "batch keys"],
) -> Bool[Array, "batch 1 1 keys"]:
    """Turn a tokenizer's attention_mask (1 = a token, 0 = padding) into a mask over keys."""
    return (attention_mask != 0)[:, None, None, :]


def combine_masks(*masks: Bool[Array, "_ _ _ _"] | None) -> Bool[Array, "_ _ _ _"] | None:
    """And of the masks that are given, broadcast against each other; None where none is."""
    combined = None
    for mask in masks:
        if mask is not None:
            combined = mask if combined is None else combined & mask
    return combined


def split_heads(
    x: Float[Array, "batch tokens width"], heads: int
) -> Float[Array, "batch tokens heads head_dim"]:
    """Cut the last axis into `heads` equal parts."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Float[Array, "batch tokens heads head_dim"]) -> Float[Array, "batch tokens width"]:
    """Undo `split_heads`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
