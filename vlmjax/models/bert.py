"""BERT's bidirectional encoder: post-norm blocks, token types, a pooler."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlmjax.errors import RecipeError
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


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape of a BERT encoder. `dropout` holds for attention weights and for what joins the stream."""

    width: int
    depth: int
    heads: int
    mlp_dim: int
    vocab_size: int
    max_length: int = 512
    type_vocab_size: int = 2
    activation: str = "gelu"
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    pad_token_id: int = 0
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self):
        """Refuse what cannot be built."""
        check_tower(self)
        if min(self.vocab_size, self.max_length, self.type_vocab_size) < 1:
            raise RecipeError(
                f"BertConfig has vocab_size {self.vocab_size}, max_length {self.max_length} and "
                f"type_vocab_size {self.type_vocab_size}; all must be positive"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise RecipeError(f"BertConfig.dropout is {self.dropout}; give a share from 0 to below 1")


def _dense(config: BertConfig, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=DTYPES[config.dtype], kernel_init=INIT, name=name)


class BertAttend(nn.Module):
    """Multi-head attention of `x` over `context`, which is `x` itself in self-attention."""

    config: BertConfig
    train: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch queries width"],
        context: Float[Array, "batch keys context_width"],
        mask: Bool[Array, "#batch 1 #queries keys"] | None,
    ) -> Float[Array, "batch queries width"]:
        """Mix the context for every query; heads are joined, not yet projected."""
        cfg = self.config
        query = heads_of(_dense(cfg, cfg.width, "query")(x), cfg.heads)
        key = heads_of(_dense(cfg, cfg.width, "key")(context), cfg.heads)
        value = heads_of(_dense(cfg, cfg.width, "value")(context), cfg.heads)
        rate = cfg.dropout if self.train else 0.0
        dropout_key = self.make_rng("dropout") if rate > 0.0 else None
        return merge_heads(
            attention(query, key, value, mask=mask, dropout_rate=rate, dropout_key=dropout_key)
        )


class BertJoin(nn.Module):
    """Project, drop out, add to the stream, normalise: how every BERT sub-layer ends."""

    config: BertConfig
    train: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens inner"], residual: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens width"]:
        """Return the new stream."""
        cfg = self.config
        x = _dense(cfg, cfg.width, "dense")(x)
        x = nn.Dropout(cfg.dropout, deterministic=not self.train)(x)
        x = LayerNorm(cfg.layer_norm_eps, DTYPES[cfg.dtype], name="LayerNorm")(x + residual)
        return stream(x)


class BertAttention(nn.Module):
    """One attention sub-layer. Cross-attention is another one of these with an image as its context."""

    config: BertConfig
    train: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch queries width"],
        context: Float[Array, "batch keys context_width"],
        mask: Bool[Array, "#batch 1 #queries keys"] | None,
    ) -> Float[Array, "batch queries width"]:
        """Attend and join."""
        mixed = BertAttend(self.config, self.train, name="self")(x, context, mask)
        return BertJoin(self.config, self.train, name="output")(mixed, x)


class BertIntermediate(nn.Module):
    """The wide half of the MLP."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens inner"]:
        """Project and activate."""
        hidden = _dense(self.config, self.config.mlp_dim, "dense")(x)
        return ACTIVATIONS[self.config.activation](constrain(hidden, "batch", None, "mlp"))


class BertLayer(nn.Module):
    """Self-attention, then an MLP; each is added to the stream, which is normalised after."""

    config: BertConfig
    train: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], mask: Bool[Array, "#batch 1 #tokens tokens"] | None
    ) -> tuple[Float[Array, "batch tokens width"], None]:
        """Return the stream after this layer, and nothing else for the scan to collect."""
        x = BertAttention(self.config, self.train, name="attention")(x, x, mask)
        hidden = BertIntermediate(self.config, name="intermediate")(x)
        return BertJoin(self.config, self.train, name="output")(hidden, x), None


class BertEmbeddings(nn.Module):
    """Words, positions and token types, added, normalised, dropped out."""

    config: BertConfig
    train: bool

    @nn.compact
    def __call__(
        self, input_ids: Ids, token_type_ids: Ids | None, position_ids: PositionIds | None
    ) -> Float[Array, "batch tokens width"]:
        """Look up; token types are 0 and positions count from zero unless given."""
        cfg = self.config
        words = self.param("word_embeddings", INIT, (cfg.vocab_size, cfg.width), jnp.float32)
        places = self.param("position_embeddings", INIT, (cfg.max_length, cfg.width), jnp.float32)
        types = self.param("token_type_embeddings", INIT, (cfg.type_vocab_size, cfg.width), jnp.float32)
        x = lookup(words, input_ids)
        # The padding row is never trained (torch's padding_idx, which BertModel uses).
        padding = jnp.asarray(input_ids == cfg.pad_token_id)[:, :, None]
        x = jnp.where(padding, jax.lax.stop_gradient(x), x)
        x = x + (types[None, :1] if token_type_ids is None else lookup(types, token_type_ids))
        x = x + (places[None, : input_ids.shape[1]] if position_ids is None else lookup(places, position_ids))
        x = LayerNorm(cfg.layer_norm_eps, DTYPES[cfg.dtype], name="LayerNorm")(x)
        return stream(nn.Dropout(cfg.dropout, deterministic=not self.train)(x))


class BertEncoder(nn.Module):
    """The layers, scanned."""

    config: BertConfig
    train: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], mask: Bool[Array, "#batch 1 #tokens tokens"] | None
    ) -> Float[Array, "batch tokens width"]:
        """Run all layers."""
        layers = stack(BertLayer, self.config.depth, self.config.remat)
        return layers(self.config, self.train, name="layer")(x, mask)[0]


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
        x = BertEmbeddings(cfg, train, name="embeddings")(input_ids, token_type_ids, position_ids)
        x = BertEncoder(cfg, train, name="encoder")(x, mask)
        pooled = BertPooler(cfg.width, name="pooler")(x[:, 0].astype(jnp.float32))
        return TowerOutput(last_hidden_state=x, pooler_output=pooled)
