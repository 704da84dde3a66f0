"""The layers of T5 (arXiv:1910.10683): pre-norm without biases, attention that is not scaled and knows distances."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vlmjax.errors import RecipeError
from vlmjax.models.bert import KeysValues
from vlmjax.models.cache import Crossed, Kept, keep
from vlmjax.models.layers import DTYPES, REMAT, RmsNorm, heads_of, stack, stream
from vlmjax.ops.activations import ACTIVATIONS
from vlmjax.ops.attention import attention, merge_heads
from vlmjax.ops.relative import relative_bias
from vlmjax.sharding.activations import constrain


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape of a T5. The defaults are those of version 1.1 and FlanT5.

    Attributes:
      depth, decoder_depth: layers of encoder and decoder.
      head_dim: width of a head; all heads together need not be as wide as the model.
      buckets, max_distance: of relative positions, see ops/relative.py.
      gated: an MLP of gate_proj, up_proj, down_proj (arXiv:2002.05202); otherwise of fc1, fc2, as in version 1.0.
      activation: of the gate. FlanT5's own is gelu_new; BLIP-2 was trained with gelu (LAVIS, blip2_t5.py).
      tied: the head is the token embedding, and states are scaled by width**-0.5 before it, as in version 1.0.
      max_length: tokens of a text in training. Nothing ends there: distances have no limit.
      decoder_start_token_id: with which what is written begins.
    """

    width: int
    depth: int
    decoder_depth: int
    heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int = 32128
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    activation: str = "gelu_new"
    gated: bool = True
    tied: bool = False
    max_length: int = 512
    pad_token_id: int = 0
    eos_token_ids: tuple[int, ...] = (1,)
    decoder_start_token_id: int = 0
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        """Refuse what cannot be built."""
        sizes = (
            "width",
            "depth",
            "decoder_depth",
            "heads",
            "head_dim",
            "mlp_dim",
            "vocab_size",
            "max_length",
        )
        for field in sizes:
            if getattr(self, field) < 1:
                raise RecipeError(f"T5Config.{field} is {getattr(self, field)}; give a positive number")
        # Half of the buckets are of one side in the encoder, half of these of one distance each.
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 2:
            raise RecipeError(
                f"T5Config has buckets {self.buckets} and max_distance {self.max_distance}; give a multiple of 4 "
                "buckets and a distance above half of it"
            )
        for field, known in (("activation", ACTIVATIONS), ("dtype", DTYPES), ("remat", REMAT)):
            if getattr(self, field) not in known:
                raise RecipeError(
                    f"T5Config.{field} is {getattr(self, field)!r}; choose one of {', '.join(known)}"
                )


def _dense(
    config: T5Config, features: int, std: float, name: str | None = None, dtype: Any = None
) -> nn.Dense:
    kind = DTYPES[config.dtype] if dtype is None else dtype
    return nn.Dense(features, use_bias=False, dtype=kind, kernel_init=nn.initializers.normal(std), name=name)


def _norm(config: T5Config, name: str | None = None) -> RmsNorm:
    return RmsNorm(config.norm_eps, _wide(config), name=name)


def _wide(config: T5Config) -> Any:
    """Dtype of the stream and of what an MLP adds to it: T5's grow beyond float16 (huggingface/transformers#20287)."""
    return jnp.float32 if config.dtype == "float16" else DTYPES[config.dtype]


class T5Told(struct.PyTreeNode):
    """What every layer is told beside the stream: see bert.Told; and the scores of distances, shared by all layers."""

    bias: Float[Array, "#batch heads tokens keys"]
    mask: Bool[Array, "#batch 1 #tokens keys"] | None = None
    slot: Int[Array, ""] | None = None
    context: Float[Array, "contexts states width"] | None = None
    context_mask: Bool[Array, "contexts 1 1 states"] | None = None
    crossed: Crossed | None = None


class T5Attention(nn.Module):
    """Attention of tokens over the keys and values of a context, itself for one; scores are not scaled."""

    config: T5Config

    def setup(self):
        """Build the projections; the initial spread of queries makes up for the scale that scores have not."""
        cfg = self.config
        inner = cfg.heads * cfg.head_dim
        self.q_proj = _dense(cfg, inner, (cfg.width * cfg.head_dim) ** -0.5)
        self.k_proj = _dense(cfg, inner, cfg.width**-0.5)
        self.v_proj = _dense(cfg, inner, cfg.width**-0.5)
        self.o_proj = _dense(cfg, cfg.width, inner**-0.5)

    def keys_values(self, context: Float[Array, "batch keys width"]) -> KeysValues:
        """What a query meets of a context."""
        heads = self.config.heads
        return heads_of(self.k_proj(context), heads), heads_of(self.v_proj(context), heads)

    def __call__(
        self,
        x: Float[Array, "rows queries width"],
        key: Float[Array, "batch keys heads head_dim"],
        value: Float[Array, "batch keys heads head_dim"],
        mask: Bool[Array, "_ 1 _ keys"] | None,
        bias: Float[Array, "_ heads _ keys"] | None = None,
    ) -> Float[Array, "rows queries width"]:
        """Mix the context for every query."""
        query = heads_of(self.q_proj(x), self.config.heads)
        # Rows that have one context in common (beams) meet it as one row: it is never repeated in memory.
        together = query.reshape(key.shape[0], -1, *query.shape[2:])
        mixed = attention(together, key, value, mask=mask, bias=bias, scale=1.0)
        return self.o_proj(merge_heads(mixed.reshape(query.shape)))


class T5Mlp(nn.Module):
    """A gated MLP, or a plain one."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Apply to every token alone."""
        cfg, activation = self.config, ACTIVATIONS[self.config.activation]

        def wide(name: str) -> Float[Array, "batch tokens mlp_dim"]:
            return constrain(_dense(cfg, cfg.mlp_dim, cfg.width**-0.5, name)(x), "batch", None, "mlp")

        hidden = activation(wide("gate_proj")) * wide("up_proj") if cfg.gated else activation(wide("fc1"))
        name = "down_proj" if cfg.gated else "fc2"
        return _dense(cfg, cfg.width, cfg.mlp_dim**-0.5, name, _wide(cfg))(hidden)


class T5Block(nn.Module):
    """Self-attention, a look at a context where there is one, an MLP, each on the normalised stream and added to it."""

    config: T5Config

    @nn.compact
    def __call__(
        self, carried: tuple[Float[Array, "batch tokens width"], Kept | None], told: T5Told
    ) -> tuple[tuple[Float[Array, "batch tokens width"], Kept | None], KeysValues | None]:
        """Return the stream and the cache after this layer.

        With a cache, the scan also collects what later tokens will meet of a context.
        """
        x, kept = carried
        y = _norm(self.config, "attention_norm")(x)
        own = T5Attention(self.config, name="self_attn")
        keys_values = own.keys_values(y)
        if kept is not None:
            kept, *keys_values = keep(kept, *keys_values, told.slot)
        x = stream(x + own(y, *keys_values, told.mask, told.bias).astype(x.dtype))
        crossed = None
        if told.context is not None or told.crossed is not None:
            x, crossed = self._look(x, kept, told)
        y = T5Mlp(self.config, name="mlp")(_norm(self.config, "mlp_norm")(x))
        x = stream(x + y.astype(x.dtype))
        return (x, None if kept is None else kept._replace(layer=kept.layer + 1)), crossed

    def _look(
        self, x: Float[Array, "batch tokens width"], kept: Kept | None, told: T5Told
    ) -> tuple[Float[Array, "batch tokens width"], KeysValues | None]:
        """Cross-attention, over a context or over keys and values that were made of one."""
        cross = T5Attention(self.config, name="cross_attn")
        y = _norm(self.config, "cross_norm")(x)
        if told.context is None:
            before = (told.crossed.k[kept.layer], told.crossed.v[kept.layer])
            made, mask = (
                tuple(part.swapaxes(1, 2).astype(DTYPES[self.config.dtype]) for part in before),
                told.crossed.mask,
            )
        else:
            made, mask = cross.keys_values(told.context), told.context_mask
        x = stream(x + cross(y, *made, mask).astype(x.dtype))
        # Kept as the cache keeps its own: heads before keys.
        return x, None if kept is None else tuple(part.swapaxes(1, 2) for part in made)


class T5Stack(nn.Module):
    """Layers, the table of distances that they share, and the norm after them."""

    config: T5Config
    depth: int
    causal: bool

    def setup(self):
        """Build all three."""
        cfg = self.config
        init = nn.initializers.normal(cfg.width**-0.5)
        self.relative_bias = self.param("relative_bias", init, (cfg.buckets, cfg.heads), jnp.float32)
        self.layers = stack(T5Block, self.depth, cfg.remat)(cfg)
        self.norm = _norm(cfg)

    def __call__(
        self, embeddings: Float[Array, "batch tokens width"], told: T5Told, kept: Kept | None = None
    ) -> tuple[Float[Array, "batch tokens width"], Kept | None, KeysValues | None]:
        """Run all layers: states, the cache, and with a cache what all layers made of a context."""
        (x, kept), crossed = self.layers((stream(embeddings.astype(_wide(self.config))), kept), told)
        return self.norm(x).astype(DTYPES[self.config.dtype]), kept, crossed

    def bias(
        self, queries: Int[Array, "_ queries"], keys: Int[Array, "_ keys"]
    ) -> Float[Array, "_ heads queries keys"]:
        """Scores of the distances between positions."""
        form = {"causal": self.causal, "max_distance": self.config.max_distance}
        return relative_bias(self.relative_bias, queries, keys, **form)
