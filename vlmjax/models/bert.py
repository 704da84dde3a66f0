"""BERT: post-norm layers that may look at a context and remember, and the bidirectional encoder made of them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vlmjax.errors import RecipeError
from vlmjax.models.cache import Crossed, Kept, keep
from vlmjax.models.layers import (
    DTYPES,
    Ids,
    LayerNorm,
    PositionIds,
    check_length,
    check_tower,
    heads_of,
    lookup,
    stack,
    stream,
)
from vlmjax.models.outputs import TowerOutput
from vlmjax.ops.activations import ACTIVATIONS
from vlmjax.ops.attention import attention, merge_heads, padding_mask
from vlmjax.sharding.activations import constrain

# initializer_range of google-research/bert, modeling.py; every kernel and table. Biases start at zero.
INIT = nn.initializers.normal(0.02)

# Keys and values of a context, [batch, keys, heads, head_dim] each.
KeysValues = tuple[Float[Array, "..."], Float[Array, "..."]]


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape of a BERT encoder. `dropout` holds for attention weights and for what joins the stream.

    `type_vocab_size` is None for a model without token types, such as BLIP's.
    """

    width: int
    depth: int
    heads: int
    mlp_dim: int
    vocab_size: int
    max_length: int = 512
    type_vocab_size: int | None = 2
    activation: str = "gelu"
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    pad_token_id: int = 0
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        """Refuse what cannot be built."""
        check_tower(self)
        types = 1 if self.type_vocab_size is None else self.type_vocab_size
        if min(self.vocab_size, self.max_length, types) < 1:
            raise RecipeError(
                f"BertConfig has vocab_size {self.vocab_size}, max_length {self.max_length} and "
                f"type_vocab_size {self.type_vocab_size}; all must be positive"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise RecipeError(f"BertConfig.dropout is {self.dropout}; give a share from 0 to below 1")


def _dense(config: BertConfig, features: int, name: str | None = None) -> nn.Dense:
    return nn.Dense(features, dtype=DTYPES[config.dtype], kernel_init=INIT, name=name)


class Told(struct.PyTreeNode):
    """What every layer is told beside the stream.

    Attributes:
      mask: whom a token may look at; None: all of them.
      slot: with a cache, where the first token goes.
      context: what cross-attention reads, an image's states for one; `context_mask` is True where it may look.
      crossed: with a cache, keys and values made of a context before.
      attention: name of the self-attention to use; a layer may have several (BLIP's, models/med.py).
      train: whether to drop out.
    """

    mask: Bool[Array, "#batch 1 #tokens keys"] | None = None
    slot: Int[Array, ""] | None = None
    context: Float[Array, "contexts states context_width"] | None = None
    context_mask: Bool[Array, "contexts 1 1 states"] | None = None
    crossed: Crossed | None = None
    attention: str = struct.field(pytree_node=False, default="attention")
    train: bool = struct.field(pytree_node=False, default=False)


class BertAttend(nn.Module):
    """Multi-head attention of tokens over the keys and values of a context."""

    config: BertConfig

    def setup(self):
        """Build the three projections."""
        self.query, self.key, self.value = (_dense(self.config, self.config.width) for _ in range(3))

    def keys_values(self, context: Float[Array, "batch keys context_width"]) -> KeysValues:
        """What a query meets of a context."""
        heads = self.config.heads
        return heads_of(self.key(context), heads), heads_of(self.value(context), heads)

    def __call__(
        self,
        x: Float[Array, "rows queries width"],
        key: Float[Array, "batch keys heads head_dim"],
        value: Float[Array, "batch keys heads head_dim"],
        mask: Bool[Array, "_ 1 _ keys"] | None,
        train: bool = False,
    ) -> Float[Array, "rows queries width"]:
        """Mix the context for every query; heads are joined, not yet projected."""
        rate = self.config.dropout if train else 0.0
        dropout_key = self.make_rng("dropout") if rate > 0.0 else None
        query = heads_of(self.query(x), self.config.heads)
        # Rows that have one context in common (beams) meet it as one row: it is never repeated in memory.
        together = query.reshape(key.shape[0], -1, *query.shape[2:])
        mixed = attention(together, key, value, mask=mask, dropout_rate=rate, dropout_key=dropout_key)
        return merge_heads(mixed.reshape(query.shape))


class BertJoin(nn.Module):
    """Project, drop out, add to the stream, normalise: how every BERT sub-layer ends."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens inner"],
        residual: Float[Array, "batch tokens width"],
        train: bool = False,
    ) -> Float[Array, "batch tokens width"]:
        """Return the new stream."""
        cfg = self.config
        x = _dense(cfg, cfg.width, "dense")(x)
        x = nn.Dropout(cfg.dropout, deterministic=not train)(x)
        x = LayerNorm(cfg.layer_norm_eps, DTYPES[cfg.dtype], name="LayerNorm")(x + residual)
        return stream(x)


class BertAttention(nn.Module):
    """One attention sub-layer. Cross-attention is another one of these with an image as its context."""

    config: BertConfig

    def setup(self):
        """Build the parts, under Hugging Face's names."""
        self.self = BertAttend(self.config)
        self.output = BertJoin(self.config)

    def keys_values(self, context: Float[Array, "batch keys context_width"]) -> KeysValues:
        """What a token meets of a context, which is the stream itself in self-attention."""
        return self.self.keys_values(context)

    def __call__(
        self,
        x: Float[Array, "rows queries width"],
        key: Float[Array, "batch keys heads head_dim"],
        value: Float[Array, "batch keys heads head_dim"],
        mask: Bool[Array, "_ 1 _ keys"] | None,
        train: bool = False,
    ) -> Float[Array, "rows queries width"]:
        """Attend and join."""
        return self.output(self.self(x, key, value, mask, train), x, train)


class BertIntermediate(nn.Module):
    """The wide half of the MLP."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens inner"]:
        """Project and activate."""
        hidden = _dense(self.config, self.config.mlp_dim, "dense")(x)
        return ACTIVATIONS[self.config.activation](constrain(hidden, "batch", None, "mlp"))


class BertLayer(nn.Module):
    """Self-attention, a look at a context where there is one, an MLP; the stream is normalised after each."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, carried: tuple[Float[Array, "batch tokens width"], Kept | None], told: Told
    ) -> tuple[tuple[Float[Array, "batch tokens width"], Kept | None], KeysValues | None]:
        """Return the stream and the cache after this layer.

        With a cache, the scan also collects what later tokens will meet of a context.
        """
        x, kept = carried
        own = BertAttention(self.config, name=told.attention)
        keys_values = own.keys_values(x)
        if kept is not None:
            kept, *keys_values = keep(kept, *keys_values, told.slot)
        x = own(x, *keys_values, told.mask, told.train)
        crossed = None
        if told.context is not None or told.crossed is not None:
            x, crossed = self._look(x, kept, told)
        hidden = BertIntermediate(self.config, name="intermediate")(x)
        x = BertJoin(self.config, name="output")(hidden, x, told.train)
        return (x, None if kept is None else kept._replace(layer=kept.layer + 1)), crossed

    def _look(
        self, x: Float[Array, "batch tokens width"], kept: Kept | None, told: Told
    ) -> tuple[Float[Array, "batch tokens width"], KeysValues | None]:
        """Cross-attention, over a context or over keys and values that were made of one."""
        cross = BertAttention(self.config, name="crossattention")
        if told.context is None:
            before = (told.crossed.k[kept.layer], told.crossed.v[kept.layer])
            made, mask = tuple(part.swapaxes(1, 2).astype(x.dtype) for part in before), told.crossed.mask
        else:
            made, mask = cross.keys_values(told.context), told.context_mask
        x = cross(x, *made, mask, told.train)
        # Kept as the cache keeps its own: heads before keys.
        return x, None if kept is None else tuple(part.swapaxes(1, 2) for part in made)


def lookup_words(
    words: Float[Array, "vocab width"], input_ids: Ids, pad_token_id: int
) -> Float[Array, "batch tokens width"]:
    """Words of ids. The row of padding is never trained (torch's padding_idx, which BertModel uses)."""
    x = lookup(words, input_ids)
    padding = jnp.asarray(input_ids == pad_token_id)[:, :, None]
    return jnp.where(padding, jax.lax.stop_gradient(x), x)


class BertEmbeddings(nn.Module):
    """Words, positions and token types, added, normalised, dropped out."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        token_type_ids: Ids | None = None,
        position_ids: PositionIds | None = None,
        train: bool = False,
    ) -> Float[Array, "batch tokens width"]:
        """Look up; token types are 0 and positions count from zero unless given."""
        cfg = self.config
        words = self.param("word_embeddings", INIT, (cfg.vocab_size, cfg.width), jnp.float32)
        places = self.param("position_embeddings", INIT, (cfg.max_length, cfg.width), jnp.float32)
        x = lookup_words(words, input_ids, cfg.pad_token_id)
        if cfg.type_vocab_size is not None:
            types = self.param("token_type_embeddings", INIT, (cfg.type_vocab_size, cfg.width), jnp.float32)
            x = x + (types[None, :1] if token_type_ids is None else lookup(types, token_type_ids))
        x = x + (places[None, : input_ids.shape[1]] if position_ids is None else lookup(places, position_ids))
        x = LayerNorm(cfg.layer_norm_eps, DTYPES[cfg.dtype], name="LayerNorm")(x)
        return stream(nn.Dropout(cfg.dropout, deterministic=not train)(x))


class BertEncoder(nn.Module):
    """The layers, scanned."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], told: Told, kept: Kept | None = None
    ) -> tuple[Float[Array, "batch tokens width"], Kept | None, KeysValues | None]:
        """Run all layers: the stream, the cache, and with a cache what all layers made of a context."""
        layers = stack(BertLayer, self.config.depth, self.config.remat)
        (x, kept), crossed = layers(self.config, name="layer")((x, kept), told)
        return x, kept, crossed


class BertPooler(nn.Module):
    """tanh of a projection of the first token, in float32."""

    width: int

    @nn.compact
    def __call__(self, first: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
        """Pool."""
        first = constrain(first, "batch", None)
        pooled = jnp.tanh(nn.Dense(self.width, dtype=jnp.float32, kernel_init=INIT, name="dense")(first))
        return constrain(pooled, "batch", None)


class Bert(nn.Module):
    """BERT (Devlin et al. 2018) as an encoder; parameters and outputs are named as in BertModel."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
        position_ids: PositionIds | None = None,
        *,
        train: bool = False,
    ) -> TowerOutput:
        """Encode token ids; a token sees every token that `attention_mask` keeps.

        With `train` and config.dropout the "dropout" rng is needed. Raises UserError for more tokens than
        config.max_length.
        """
        cfg = self.config
        check_length(input_ids, cfg.max_length)
        mask = None if attention_mask is None else padding_mask(jnp.asarray(attention_mask))
        x = BertEmbeddings(cfg, name="embeddings")(input_ids, token_type_ids, position_ids, train)
        x, _, _ = BertEncoder(cfg, name="encoder")(x, Told(mask=mask, train=train))
        pooled = BertPooler(cfg.width, name="pooler")(x[:, 0].astype(jnp.float32))
        return TowerOutput(last_hidden_state=x, pooler_output=pooled)
