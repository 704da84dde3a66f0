"""Keys and values of tokens that a decoder has seen: fixed shapes, so that every further token is one program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vlmjax.errors import UserError
from vlmjax.ops.attention import segment_mask
from vlmjax.sharding.activations import constrain


@struct.dataclass
class Cache:
    """What a decoder remembers of each row, in slots that all rows fill together.

    Attributes:
      k: keys, already turned by their positions, [layers, batch, kv_heads, slots, head_dim]. A query meets the slots
        of one head: with slots before heads a CPU would transpose all of them for every token, at 6 times the cost.
      v: values, the same shape.
      segment_ids: number of the document that the token of a slot belongs to, int32 [batch, slots]; 0 is padding or an
        empty slot.
      positions: of the tokens, int32 [batch, slots]; a sliding window is measured in them, so padding between tokens
        does not count.
      length: the next slot, int32 []. A call with n tokens fills slots length .. length + n - 1 of every row.
      crossed: of a decoder that also looks at an image or a question, what it looks at; None of any other. Rows may be
        a multiple of its batch: those that share what they look at (beams) lie side by side.
    """

    # Any: transformations also put shapes, shardings and axes into these fields.
    k: Any
    v: Any
    segment_ids: Any
    positions: Any
    length: Any
    crossed: Any = None

    @property
    def slots(self) -> int:
        """How many tokens a row can hold, padding included."""
        return self.k.shape[3]


class Crossed(NamedTuple):
    """What cross-attention looks at: keys and values of every layer, made once, and which of them are no padding."""

    k: Float[Array, "layers batch heads keys head_dim"]
    v: Float[Array, "layers batch heads keys head_dim"]
    mask: Bool[Array, "batch 1 1 keys"] | None


class Kept(NamedTuple):
    """The cache on its way through the layers."""

    k: Float[Array, "layers batch kv_heads slots head_dim"]
    v: Float[Array, "layers batch kv_heads slots head_dim"]
    layer: Int[Array, ""]


def empty_cache(
    layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: Any = jnp.float32
) -> Cache:
    """A cache without tokens."""

    def zeros() -> Array:
        shape = (layers, batch, kv_heads, slots, head_dim)
        return constrain(jnp.zeros(shape, dtype), None, "batch", "heads", None, None)

    nothing = jnp.zeros((batch, slots), jnp.int32)
    return Cache(zeros(), zeros(), nothing, nothing, jnp.zeros((), jnp.int32))


def admit(
    cache: Cache, positions: Int[Array, "batch tokens"], segment_ids: Int[Array, "batch tokens"]
) -> Cache:
    """The cache with places for new tokens; layers then `write` their keys and values. Raises UserError."""
    tokens = positions.shape[1]
    if tokens > cache.slots:
        raise UserError(f"{tokens} tokens do not fit a cache of {cache.slots} slots; make it longer")
    place = (jnp.zeros((), jnp.int32), cache.length)
    return cache.replace(
        segment_ids=jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids.astype(jnp.int32), place),
        positions=jax.lax.dynamic_update_slice(cache.positions, positions.astype(jnp.int32), place),
        length=cache.length + tokens,
    )


def cache_mask(cache: Cache, tokens: int, window: int | None = None) -> Bool[Array, "batch 1 tokens slots"]:
    """What the last `tokens` tokens that were admitted may look at: their own document up to themselves.

    `window` leaves a token itself and those less than `window` positions before it.
    """
    slots = cache.length - tokens + jnp.arange(tokens, dtype=jnp.int32)
    place = (jnp.zeros((), jnp.int32), cache.length - tokens)
    shape = (cache.positions.shape[0], tokens)
    own, where = (jax.lax.dynamic_slice(x, place, shape) for x in (cache.segment_ids, cache.positions))
    earlier = jnp.arange(cache.slots, dtype=jnp.int32)[None, :] <= slots[:, None]
    mask = earlier[None, None] & segment_mask(own, cache.segment_ids)
    if window is not None:
        mask = mask & (where[:, :, None] - cache.positions[:, None, :] < window)[:, None]
    return mask


def write(
    kept: Float[Array, "layers batch kv_heads slots head_dim"],
    new: Float[Array, "batch tokens kv_heads head_dim"],
    layer: Int[Array, ""],
    slot: Int[Array, ""],
) -> Float[Array, "layers batch kv_heads slots head_dim"]:
    """Keys or values with those of one layer's new tokens; inside a loop this happens in place."""
    zero = jnp.zeros((), jnp.int32)
    new = new.swapaxes(1, 2)[None].astype(kept.dtype)
    return jax.lax.dynamic_update_slice(kept, new, (layer, zero, zero, slot, zero))


def keep(
    kept: Kept,
    k: Float[Array, "batch tokens kv_heads head_dim"],
    v: Float[Array, "batch tokens kv_heads head_dim"],
    slot: Int[Array, ""],
) -> tuple[
    Kept, Float[Array, "batch slots kv_heads head_dim"], Float[Array, "batch slots kv_heads head_dim"]
]:
    """One layer's new keys and values joined to those that are kept: the cache, and all of this layer."""
    kept = kept._replace(k=write(kept.k, k, kept.layer, slot), v=write(kept.v, v, kept.layer, slot))
    keys, values = (x[kept.layer].astype(k.dtype).swapaxes(1, 2) for x in (kept.k, kept.v))
    return kept, keys, values
