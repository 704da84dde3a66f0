"""BLIP's text transformer: BERT's layers as a text encoder, an image-grounded encoder and an image-grounded decoder.

Encoder and decoder share everything but self-attention and its norm (2201.12086, section 3.1 and table 3): a layer
holds `attention` for encoding and `decoder_attention` for writing, and one of all else. Parameters are made by use: a
model that only encodes has no `decoder_attention` and no `head`, one that only writes no `attention`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlmjax.models.bert import INIT, BertConfig, BertEmbeddings, BertEncoder, Told
from vlmjax.models.cache import Cache, Crossed, Kept, admit, cache_mask, empty_cache
from vlmjax.models.layers import DTYPES, Ids, LayerNorm, PositionIds, check_length
from vlmjax.ops.activations import ACTIVATIONS
from vlmjax.ops.attention import causal_mask, combine_masks, padding_mask
from vlmjax.sharding.activations import constrain

ENCODER, DECODER = "attention", "decoder_attention"
States = Float[Array, "contexts states context_width"]
ContextMask = Int[Array | np.ndarray, "contexts states"]


class LanguageHead(nn.Module):
    """What lies between the last layer and the words: a projection, an activation, a norm; and a bias per word."""

    config: BertConfig

    def setup(self):
        """Build them."""
        cfg, dtype = self.config, DTYPES[self.config.dtype]
        self.dense = nn.Dense(cfg.width, dtype=dtype, kernel_init=INIT)
        self.LayerNorm = LayerNorm(cfg.layer_norm_eps, dtype)
        self.bias = self.param("bias", nn.initializers.zeros_init(), (cfg.vocab_size,), jnp.float32)

    def __call__(
        self, hidden: Float[Array, "batch tokens width"], words: Float[Array, "vocab width"]
    ) -> Float[Array, "batch tokens vocab"]:
        """Scores of all words, in float32; `words` is their embedding, which is the last kernel too."""
        hidden = self.LayerNorm(ACTIVATIONS[self.config.activation](self.dense(hidden)))
        scores = jnp.einsum(
            "btw,vw->btv", hidden, words.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        return constrain(scores + self.bias[None, None], "batch", None, "vocab")


class Med(nn.Module):
    """The multimodal mixture of encoder and decoder."""

    config: BertConfig

    def setup(self):
        """Build what all forms share, and the decoder's head."""
        self.embeddings = BertEmbeddings(self.config)
        self.encoder = BertEncoder(self.config)
        self.head = LanguageHead(self.config)

    def encode(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        context: States | None = None,
        context_mask: ContextMask | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch tokens width"]:
        """States of texts whose tokens see each other, and with a context that too.

        Args:
          input_ids: padded on either side; positions count from the first column.
          attention_mask: 1 on tokens, 0 on padding, which nothing sees; None: no padding.
          context: states of each row's image, for an image-grounded encoder; None for a text encoder.
          context_mask: likewise of the context.
          train: draw dropout from the "dropout" rng.

        Raises:
          UserError: more tokens than positions.
        """
        told = Told(_seen(attention_mask), None, context, _seen(context_mask), attention=ENCODER, train=train)
        return self.encoder(self.embed(input_ids, train=train), told)[0]

    def embed(
        self, input_ids: Ids, positions: PositionIds | None = None, *, train: bool = False
    ) -> Float[Array, "batch tokens width"]:
        """Tokens as the layers take them; positions count from zero unless given.

        Raises UserError where so more are counted than there are.
        """
        if positions is None:
            check_length(input_ids, self.config.max_length)
        return self.embeddings(input_ids, None, positions, train)

    def decode(
        self,
        embeddings: Float[Array, "rows tokens width"],
        attention_mask: Int[Array | np.ndarray, "rows tokens"] | None = None,
        context: States | None = None,
        context_mask: ContextMask | None = None,
        *,
        cache: Cache | None = None,
        positions: Int[Array, "rows tokens"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "rows tokens width"], Cache | None]:
        """States of tokens that see those before them and a context.

        Args:
          embeddings: from `embed`.
          attention_mask: 1 on tokens, 0 on padding.
          context, context_mask: as for `encode`. Left out where the cache remembers them.
          cache: tokens that came before. New ones take the next slots of every row.
          positions: of each token, which a cache remembers; `embed` has added them already.
          train: as for `encode`.

        Returns:
          states, and the cache with the new tokens and the context, None without one. More tokens than a cache has
          slots give NaN.
        """
        tokens, told = embeddings.shape[1], Told(attention=DECODER, train=train)
        told = told.replace(context=context, context_mask=_seen(context_mask))
        if cache is None:
            mask = combine_masks(causal_mask(tokens, tokens), _seen(attention_mask))
            return self.encoder(embeddings, told.replace(mask=mask))[0], None
        real = (
            jnp.ones(embeddings.shape[:2], jnp.int32)
            if attention_mask is None
            else jnp.asarray(attention_mask)
        )
        slot, places = cache.length, jnp.zeros(real.shape, jnp.int32) if positions is None else positions
        cache = admit(cache, places, (real != 0).astype(jnp.int32))
        told = told.replace(mask=cache_mask(cache, tokens), slot=slot)
        told = told if context is not None else told.replace(crossed=cache.crossed)
        kept = Kept(cache.k, cache.v, jnp.zeros((), jnp.int32))
        hidden, kept, made = self.encoder(embeddings, told, kept)
        hidden = jnp.where(
            cache.length <= cache.slots, hidden, jnp.nan
        )  # too many tokens must not pass unseen
        crossed = cache.crossed if context is None else Crossed(*made, told.context_mask)
        return hidden, cache.replace(k=kept.k, v=kept.v, crossed=crossed)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache for `slots` tokens a row."""
        return init_cache(self.config, batch, slots)

    def logits(self, hidden: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens vocab"]:
        """Scores of the next token, in float32."""
        return self.head(hidden, self.embeddings.get_variable("params", "word_embeddings"))


def init_cache(config: BertConfig, batch: int, slots: int, dtype: Any = None) -> Cache:
    """An empty cache for `slots` tokens a row; `dtype`, of the keys and values, is config.dtype unless given."""
    kind = DTYPES[config.dtype] if dtype is None else jnp.dtype(dtype)
    return empty_cache(config.depth, batch, slots, config.heads, config.width // config.heads, kind)


def first_token(
    input_ids: Ids, attention_mask: Ids | None, token_id: int | None
) -> Int[Array, "batch tokens"]:
    """Texts that begin with another token: [ENC] or [DEC] in place of the [CLS] that a tokenizer writes.

    The first token that is no padding changes. `token_id` None leaves texts as they are.
    """
    ids = jnp.asarray(input_ids)
    if token_id is None:
        return ids
    if attention_mask is None:
        return ids.at[:, 0].set(token_id)
    start = jnp.argmax(jnp.asarray(attention_mask) != 0, axis=1)
    return ids.at[jnp.arange(ids.shape[0]), start].set(token_id)


def _seen(mask: Any) -> Bool[Array, "batch 1 1 keys"] | None:
    return None if mask is None else padding_mask(jnp.asarray(mask))
