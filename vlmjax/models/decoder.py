"""Decoder-only language models: Llama, Vicuna, Mistral and Qwen2 with rotary positions, OPT with learned ones."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlmjax.errors import RecipeError
from vlmjax.models.cache import Cache, Kept, admit, cache_mask, empty_cache, keep
from vlmjax.models.layers import DTYPES, REMAT, Ids, LayerNorm, RmsNorm, heads_of, lookup, stack, stream
from vlmjax.ops.activations import ACTIVATIONS
from vlmjax.ops.attention import attention, merge_heads
from vlmjax.ops.flash import IMPLEMENTATIONS
from vlmjax.ops.rotary import Rope, angles, rotate
from vlmjax.sharding.activations import constrain

NORMS = {"rms": RmsNorm, "layer": LayerNorm}
FAMILIES = ("llama", "mistral", "qwen2", "opt")
# Rows of OPT's position table before that of position 0 (fairseq counted from its padding id, 1).
LEARNED_OFFSET = 2


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. The defaults are Llama's; DECODERS has those that are known by name.

    Attributes:
      head_dim: width of a head, which need not be width / heads.
      kv_heads: heads of keys and values, each shared by heads / kv_heads heads of queries.
      rope: rotary positions; None for learned ones, of which there are then `max_length`.
      norm: `rms` or `layer`.
      pre_norm: normalise what a sub-layer reads; otherwise what it leaves (opt-350m).
      final_norm: normalise the last hidden state.
      gated: an MLP of gate_proj, up_proj, down_proj; otherwise of fc1, fc2.
      tied: the head is the token embedding.
      window: a token sees itself and the window - 1 before it; None is no limit.
      embed_dim: width of token embedding and head where it is not the model's (opt-350m); None is the same.
      bos_token_id, eos_token_ids, pad_token_id: the tokenizer's; kept for generation, the model does not use them.
      family: one of FAMILIES, whose Hugging Face class it is written as. It decides nothing else.
      attention: what computes it without a cache, one of ops.flash.IMPLEMENTATIONS; `choose_attention` there picks.
    """

    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int
    max_length: int = 4096
    rope: Rope | None = Rope()
    norm: str = "rms"
    norm_eps: float = 1e-5
    pre_norm: bool = True
    final_norm: bool = True
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    window: int | None = None
    embed_dim: int | None = None
    init_std: float = 0.02
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = None
    family: str = "llama"
    attention: str = "xla"
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        """Refuse what cannot be built."""
        sizes = ("width", "depth", "heads", "kv_heads", "head_dim", "mlp_dim", "vocab_size", "max_length")
        for field in (*sizes, "window", "embed_dim"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise RecipeError(f"DecoderConfig.{field} is {value}; give a positive number")
        if self.heads % self.kv_heads:
            raise RecipeError(
                f"DecoderConfig.heads {self.heads} is not a multiple of kv_heads {self.kv_heads}; change either of them"
            )
        if self.rope is not None and self.head_dim % 2:
            raise RecipeError(f"DecoderConfig.head_dim {self.head_dim} is odd; rotary positions turn pairs")
        tables = {"activation": ACTIVATIONS, "norm": NORMS, "family": FAMILIES, "attention": IMPLEMENTATIONS}
        tables |= {"dtype": DTYPES, "remat": REMAT}
        for field, known in tables.items():
            if getattr(self, field) not in known:
                raise RecipeError(
                    f"DecoderConfig.{field} is {getattr(self, field)!r}; choose one of {', '.join(known)}"
                )


class Shared(NamedTuple):
    """What every layer is told: angles of the tokens, and whom they may look at."""

    angles: Float[Array, "batch tokens pairs"] | None
    segment_ids: Int[Array, "batch tokens"] | None
    mask: Bool[Array, "batch 1 tokens slots"] | None  # with a cache
    slot: Int[Array, ""] | None  # with a cache, where the first token goes


def _dense(config: DecoderConfig, features: int, bias: bool, name: str | None = None) -> nn.Dense:
    init = nn.initializers.normal(config.init_std)
    return nn.Dense(features, use_bias=bias, dtype=DTYPES[config.dtype], kernel_init=init, name=name)


def _norm(config: DecoderConfig, name: str | None = None) -> nn.Module:
    return NORMS[config.norm](config.norm_eps, DTYPES[config.dtype], name=name)


class DecoderAttention(nn.Module):
    """Causal self-attention; with a cache its tokens join those that are kept."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], shared: Shared, kept: Kept | None
    ) -> tuple[Float[Array, "batch tokens width"], Kept | None]:
        """Return what to add to the stream, and the cache."""
        cfg = self.config
        sizes = {"q_proj": cfg.heads, "k_proj": cfg.kv_heads, "v_proj": cfg.kv_heads}
        q, k, v = (
            heads_of(_dense(cfg, heads * cfg.head_dim, cfg.qkv_bias, name)(x), heads)
            for name, heads in sizes.items()
        )
        if shared.angles is not None:
            q, k = rotate(q, shared.angles), rotate(k, shared.angles)
        if kept is None:
            form = {"causal": True, "window": cfg.window, "implementation": cfg.attention}
            mixed = attention(q, k, v, segment_ids=shared.segment_ids, **form)
        else:
            kept, keys, values = keep(kept, k, v, shared.slot)
            mixed = attention(q, keys, values, mask=shared.mask)
        return _dense(cfg, cfg.width, cfg.out_bias, "o_proj")(merge_heads(mixed)), kept


class DecoderMlp(nn.Module):
    """A gated MLP (arXiv:2002.05202), or a plain one."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Apply to every token alone."""
        cfg, activation = self.config, ACTIVATIONS[self.config.activation]

        def wide(name: str) -> Float[Array, "batch tokens mlp_dim"]:
            return constrain(_dense(cfg, cfg.mlp_dim, cfg.mlp_bias, name)(x), "batch", None, "mlp")

        hidden = activation(wide("gate_proj")) * wide("up_proj") if cfg.gated else activation(wide("fc1"))
        return _dense(cfg, cfg.width, cfg.mlp_bias, "down_proj" if cfg.gated else "fc2")(hidden)


class DecoderBlock(nn.Module):
    """Attention, then an MLP, each added to the stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, carried: tuple[Float[Array, "batch tokens width"], Kept | None], shared: Shared
    ) -> tuple[tuple[Float[Array, "batch tokens width"], Kept | None], None]:
        """Return the stream and the cache after this layer, and nothing else for the scan to collect."""
        cfg = self.config
        x, kept = carried
        norm = _norm(cfg, "attention_norm")
        y = norm(x) if cfg.pre_norm else x
        y, kept = DecoderAttention(cfg, name="self_attn")(y, shared, kept)
        x = stream(x + y if cfg.pre_norm else norm(x + y))
        norm = _norm(cfg, "mlp_norm")
        y = DecoderMlp(cfg, name="mlp")(norm(x) if cfg.pre_norm else x)
        x = stream(x + y if cfg.pre_norm else norm(x + y))
        return (x, None if kept is None else kept._replace(layer=kept.layer + 1)), None


class Decoder(nn.Module):
    """A causal language model, in parts: `embed`, the layers, `logits`. `causal_lm` is all of them."""

    config: DecoderConfig

    def setup(self):
        """Build tables, layers and the last norm."""
        cfg = self.config
        init = nn.initializers.normal(cfg.init_std)
        inner = cfg.embed_dim or cfg.width
        self.token_embedding = self.param("token_embedding", init, (cfg.vocab_size, inner), jnp.float32)
        if not cfg.tied:
            # Laid out as the embedding, so that one rule places both.
            self.lm_head = self.param("lm_head", init, (cfg.vocab_size, inner), jnp.float32)
        if cfg.rope is None:
            rows = cfg.max_length + LEARNED_OFFSET
            self.position_embedding = self.param("position_embedding", init, (rows, cfg.width), jnp.float32)
        if cfg.embed_dim is not None:
            self.project_in = _dense(cfg, cfg.width, False)
            self.project_out = _dense(cfg, cfg.embed_dim, False)
        self.layers = stack(DecoderBlock, cfg.depth, cfg.remat)(cfg)
        if cfg.final_norm:
            self.norm = _norm(cfg)

    def embed(self, input_ids: Ids) -> Float[Array, "batch tokens width"]:
        """Token embeddings as the layers take them; NaN for an id outside the table."""
        x = stream(lookup(self.token_embedding, input_ids).astype(DTYPES[self.config.dtype]))
        return x if self.config.embed_dim is None else stream(self.project_in(x))

    def __call__(
        self,
        embeddings: Float[Array, "batch tokens width"],
        *,
        positions: Int[Array | np.ndarray, "batch tokens"],
        segment_ids: Int[Array | np.ndarray, "batch tokens"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch tokens embed_dim"], Cache | None]:
        """Run the layers over embeddings of any origin.

        Args:
          embeddings: from `embed`, or of images projected to the same width.
          positions: of each token in its document. They only turn keys and add learned positions: a token sees those
            before it in the row, whatever their positions, except that with a cache `config.window` is measured in
            them.
          segment_ids: documents packed in a row by number, 0 for padding; a token sees its own document. None: each
            row is one document without padding.
          cache: tokens that came before. New ones take the next slots of every row.

        Returns:
          Hidden states after the last norm (config.embed_dim wide where that is given), and the cache with the new
          tokens, None without one. More tokens than a cache has slots give NaN; padding has no meaningful state.
        """
        cfg = self.config
        positions = jnp.asarray(positions)
        segments = None if segment_ids is None else jnp.asarray(segment_ids)
        x = embeddings.astype(DTYPES[cfg.dtype])
        if cfg.rope is None:
            x = x + lookup(self.position_embedding, positions + LEARNED_OFFSET).astype(x.dtype)
        turned = None if cfg.rope is None else angles(cfg.rope, positions, cfg.head_dim)
        if cache is None:
            shared = Shared(turned, segments, None, None)
            (x, _), _ = self.layers((stream(x), None), shared)
        else:
            slot = cache.length
            segments = jnp.ones(positions.shape, jnp.int32) if segments is None else segments
            cache = admit(cache, positions, segments)
            shared = Shared(turned, None, cache_mask(cache, x.shape[1], cfg.window), slot)
            kept = Kept(cache.k, cache.v, jnp.zeros((), jnp.int32))
            (x, kept), _ = self.layers((stream(x), kept), shared)
            x = jnp.where(cache.length <= cache.slots, x, jnp.nan)  # too many tokens must not pass unseen
            cache = cache.replace(k=kept.k, v=kept.v)
        x = self.norm(x) if cfg.final_norm else x
        return (x if cfg.embed_dim is None else stream(self.project_out(x))), cache

    def head_kernel(self) -> Float[Array, "embed_dim vocab"]:
        """The matrix from hidden states to logits, as the parameters hold it."""
        return (self.token_embedding if self.config.tied else self.lm_head).T

    def logits(self, hidden: Float[Array, "batch tokens embed_dim"]) -> Float[Array, "batch tokens vocab"]:
        """Scores of the next token, in float32. In training losses/token_cross_entropy.py does without them."""
        kernel = self.head_kernel().astype(hidden.dtype)
        scores = jnp.einsum("bld,dv->blv", hidden, kernel, preferred_element_type=jnp.float32)
        return constrain(scores, "batch", None, "vocab")

    def prepare(
        self, input_ids: Ids, attention_mask: Ids | None = None
    ) -> tuple[
        Float[Array, "batch tokens width"], Int[Array, "batch tokens"], Int[Array, "batch tokens"] | None
    ]:
        """Texts, padded on either side, as a call takes them: embeddings, positions, segment_ids.

        Positions count the tokens that `attention_mask` keeps; without one there are no segments.
        """
        return self.embed(input_ids), *text_places(input_ids, attention_mask)

    def causal_lm(
        self, input_ids: Ids, attention_mask: Ids | None = None
    ) -> Float[Array, "batch tokens vocab"]:
        """Logits of whole texts, padded on either side."""
        embeddings, positions, segments = self.prepare(input_ids, attention_mask)
        hidden, _ = self(embeddings, positions=positions, segment_ids=segments)
        return self.logits(hidden)


def text_places(
    input_ids: Ids, attention_mask: Ids | None
) -> tuple[Int[Array, "batch tokens"], Int[Array, "batch tokens"] | None]:
    """(positions, segment_ids) of texts that are each a document; without a mask there is no padding."""
    ids = jnp.asarray(input_ids)
    mask = jnp.ones(ids.shape, jnp.int32) if attention_mask is None else jnp.asarray(attention_mask)
    return text_positions(mask), None if attention_mask is None else (mask != 0).astype(jnp.int32)


def text_positions(attention_mask: Int[Array, "batch tokens"]) -> Int[Array, "batch tokens"]:
    """Positions of padded texts: tokens count from 0, padding stands where the token before it does."""
    return jnp.maximum(jnp.cumsum((attention_mask != 0).astype(jnp.int32), axis=1) - 1, 0)


def init_cache(config: DecoderConfig, batch: int, slots: int, dtype: Any = None) -> Cache:
    """An empty cache for `slots` tokens a row; `dtype`, of the keys and values, is config.dtype unless given."""
    kind = DTYPES[config.dtype] if dtype is None else jnp.dtype(dtype)
    return empty_cache(config.depth, batch, slots, config.kv_heads, config.head_dim, kind)
