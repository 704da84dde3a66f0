"""Scaled dot-product attention, the one place where scores are masked and softened."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from vlmjax.ops import flash

KERNELS = {"cudnn": flash.cudnn, "splash": flash.splash}


def attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    *,
    mask: Bool[Array, "#batch #heads #queries keys"] | None = None,
    bias: Float[Array, "#batch #heads #queries keys"] | None = None,
    causal: bool = False,
    window: int | None = None,
    segment_ids: Int[Array, "batch queries"] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    implementation: str = "xla",
) -> Float[Array, "batch queries heads head_dim"]:
    """Mix `v` with the weights softmax(scale * q.k + bias), scores and softmax in float32.

    `mask` is True where a query may look. `causal` also hides later keys; with fewer queries than keys the
    queries are the last ones. `window`, with `causal`, leaves a query itself and the window - 1 keys before it.
    `segment_ids`, where queries and keys are the same tokens, lets a token look at those of its own number;
    tokens of number 0 are padding, which sees nothing and is not seen. `scale` is head_dim**-0.5 unless given.
    Fewer `kv_heads` than heads are shared by groups of heads that follow each other (arXiv:2305.13245) and are never
    repeated in memory. A query that may look nowhere gives zeros and passes no gradient (as torch's
    scaled_dot_product_attention does), never NaN.
    `dropout_rate` above zero needs `dropout_key` and drops weights, keeping their expectation.
    `implementation` is one of flash.IMPLEMENTATIONS (`flash.choose_attention` picks one for a mesh): others than xla
    are for causal attention of tokens among themselves, without mask, bias or dropout.
    The result has the dtype of `v`.
    """
    if implementation != "xla":
        if (
            not causal
            or q.shape[1] != k.shape[1]
            or mask is not None
            or bias is not None
            or dropout_rate > 0.0
        ):
            raise ValueError(
                f"attention by {implementation!r} is causal, of tokens among themselves, without mask, bias or "
                "dropout; use implementation='xla' here"
            )
        return KERNELS[implementation](q, k, v, window=window, segment_ids=segment_ids, scale=scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = _scores(q, k) * scale
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if causal:
        mask = combine_masks(mask, causal_mask(q.shape[1], k.shape[1], window))
    if segment_ids is not None:
        mask = combine_masks(mask, segment_mask(segment_ids, segment_ids))
    if mask is not None:
        # The lowest finite number, not -inf: a row of only -inf makes the softmax and its gradient NaN.
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if dropout_rate > 0.0:
        if dropout_key is None:
            raise ValueError(f"attention with dropout_rate={dropout_rate} needs a dropout_key")
        kept = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights.shape)
        weights = jnp.where(kept, weights / (1.0 - dropout_rate), 0.0)
    out = _mix(weights.astype(v.dtype), v)
    if mask is not None:
        looks = mask.any(axis=-1).swapaxes(1, 2)[..., None]
        out = jnp.where(looks, out, jnp.zeros((), out.dtype))
    return out


def _scores(
    q: Float[Array, "batch queries heads head_dim"], k: Float[Array, "batch keys kv_heads head_dim"]
) -> Float[Array, "batch heads queries keys"]:
    """Products in float32; with fewer key heads, head g * n + i of the queries meets head g of the keys."""
    if q.shape[2] == k.shape[2]:
        return jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("bqgnd,bkgd->bgnqk", grouped, k, preferred_element_type=jnp.float32)
    return scores.reshape(scores.shape[0], -1, *scores.shape[3:])


def _mix(
    weights: Float[Array, "batch heads queries keys"], v: Float[Array, "batch keys kv_heads head_dim"]
) -> Float[Array, "batch queries heads head_dim"]:
    """Weighted sums of the values, groups as in `_scores`."""
    if weights.shape[1] == v.shape[2]:
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    grouped = weights.reshape(weights.shape[0], v.shape[2], -1, *weights.shape[2:])
    out = jnp.einsum("bgnqk,bkgd->bqgnd", grouped, v)
    return out.reshape(*out.shape[:2], -1, out.shape[4])


def causal_mask(queries: int, keys: int, window: int | None = None) -> Bool[Array, "1 1 queries keys"]:
    """True where key j is not later than query i, nor `window` or more before it; the last query is the last key."""
    position = jnp.arange(queries)[:, None] + (keys - queries)
    seen = jnp.arange(keys)[None, :] <= position
    if window is not None:
        seen = seen & (jnp.arange(keys)[None, :] > position - window)
    return seen[None, None]


def segment_mask(
    queries: Int[Array, "batch queries"], keys: Int[Array, "batch keys"]
) -> Bool[Array, "batch 1 queries keys"]:
    """True where a query and a key have the same number, 0 (padding) aside."""
    return ((queries[:, :, None] == keys[:, None, :]) & (queries != 0)[:, :, None])[:, None]


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
