"""T5 (arXiv:1910.10683), its version 1.1 and FlanT5 (arXiv:2210.11416): one stack that reads, one that writes."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlmjax.errors import UserError
from vlmjax.models.cache import Cache, Crossed, Kept, admit, cache_mask, empty_cache
from vlmjax.models.layers import DTYPES, Ids, lookup, stream
from vlmjax.models.t5_layers import T5Config, T5Stack, T5Told
from vlmjax.ops.attention import causal_mask, combine_masks, padding_mask
from vlmjax.sharding.activations import constrain

States = Float[Array, "contexts states width"]
StatesMask = Int[Array | np.ndarray, "contexts states"]


class T5(nn.Module):
    """T5ForConditionalGeneration. `decode.generate` writes with it, `decode.rank` scores given answers."""

    config: T5Config

    def setup(self):
        """Build embedding, head and both stacks."""
        cfg = self.config
        shape = (cfg.vocab_size, cfg.width)
        self.token_embedding = self.param("token_embedding", nn.initializers.normal(1.0), shape, jnp.float32)
        if not cfg.tied:
            init = nn.initializers.normal(cfg.width**-0.5)
            self.lm_head = self.param("lm_head", init, shape, jnp.float32)
        self.encoder = T5Stack(cfg, cfg.depth, causal=False)
        self.decoder = T5Stack(cfg, cfg.decoder_depth, causal=True)

    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        decoder_input_ids: Int[Array | np.ndarray, "batch answer"] | None = None,
        decoder_attention_mask: Int[Array | np.ndarray, "batch answer"] | None = None,
    ) -> Float[Array, "batch answer vocab"]:
        """Scores of the token after each of an answer, which begins with config.decoder_start_token_id.

        `decoder_ids` makes such answers of labels. Raises UserError without answers.
        """
        if decoder_input_ids is None:
            raise UserError(
                "decoder_input_ids is missing; give the answers (`decoder_ids` of their labels), or use decode.generate"
            )
        states = self.encode(self.embed(input_ids), attention_mask)
        answers = self.embed(decoder_input_ids)
        return self.logits(self.decode(answers, decoder_attention_mask, states, attention_mask)[0])

    def embed(
        self, input_ids: Ids, positions: Int[Array | np.ndarray, "_ tokens"] | None = None
    ) -> Float[Array, "batch tokens width"]:
        """Token embeddings as both stacks take them, NaN for an id outside the table; `positions` are not in them."""
        return stream(lookup(self.token_embedding, input_ids).astype(DTYPES[self.config.dtype]))

    def encode(
        self, embeddings: Float[Array, "batch tokens width"], attention_mask: Ids | None = None
    ) -> Float[Array, "batch tokens width"]:
        """States of texts, of embeddings of any origin. Positions are columns; padding is not seen."""
        places = jnp.arange(embeddings.shape[1], dtype=jnp.int32)[None]
        told = T5Told(self.encoder.bias(places, places), _seen(attention_mask))
        return self.encoder(embeddings, told)[0]

    def decode(
        self,
        embeddings: Float[Array, "rows tokens width"],
        attention_mask: Int[Array | np.ndarray, "rows tokens"] | None = None,
        context: States | None = None,
        context_mask: StatesMask | None = None,
        *,
        cache: Cache | None = None,
        positions: Int[Array, "rows tokens"] | None = None,
    ) -> tuple[Float[Array, "rows tokens width"], Cache | None]:
        """States of tokens that see those before them and what the encoder read.

        Args:
          embeddings: from `embed`.
          attention_mask: 1 on tokens, 0 on padding.
          context, context_mask: what `encode` gave, and its mask. Left out where the cache remembers them. There may
            be as many rows for each, side by side.
          cache: tokens that came before. New ones take the next slots of every row.
          positions: of each token; None: they count from zero.

        Returns:
          states, and the cache with the new tokens and the context, None without one. More tokens than a cache has
          slots give NaN.
        """
        rows, tokens = embeddings.shape[:2]
        places = jnp.arange(tokens, dtype=jnp.int32)[None] if positions is None else positions
        told = {"context": context, "context_mask": _seen(context_mask)}
        if cache is None:
            mask = combine_masks(causal_mask(tokens, tokens), _seen(attention_mask))
            return self.decoder(embeddings, T5Told(self.decoder.bias(places, places), mask, **told))[0], None
        real = jnp.ones((rows, tokens), jnp.int32) if attention_mask is None else jnp.asarray(attention_mask)
        slot, places = cache.length, jnp.broadcast_to(places, (rows, tokens))
        cache = admit(cache, places, (real != 0).astype(jnp.int32))
        crossed = cache.crossed if context is None else None
        bias, mask = self.decoder.bias(places, cache.positions), cache_mask(cache, tokens)
        told = T5Told(bias, mask, slot, **told, crossed=crossed)
        kept = Kept(cache.k, cache.v, jnp.zeros((), jnp.int32))
        hidden, kept, made = self.decoder(embeddings, told, kept)
        # Too many tokens must not pass unseen.
        hidden = jnp.where(cache.length <= cache.slots, hidden, jnp.nan)
        crossed = cache.crossed if context is None else Crossed(*made, told.context_mask)
        return hidden, cache.replace(k=kept.k, v=kept.v, crossed=crossed)

    def head_kernel(self) -> Float[Array, "width vocab"]:
        """The matrix from hidden states to logits."""
        return (self.token_embedding if self.config.tied else self.lm_head).T

    def logits(self, hidden: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens vocab"]:
        """Scores of the next token, in float32."""
        if self.config.tied:
            hidden = hidden * self.config.width**-0.5
        kernel = self.head_kernel().astype(hidden.dtype)
        scores = jnp.einsum("btw,wv->btv", hidden, kernel, preferred_element_type=jnp.float32)
        return constrain(scores, "batch", None, "vocab")

    def prompt(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What `generate` is given, made the start of an answer, and what it answers, on the host. Raises UserError."""
        return open_answer(inputs, self.config)

    def context(
        self, encoder_ids: Int[Array, "batch words"], encoder_mask: Int[Array, "batch words"], **_: Any
    ) -> tuple[Float[Array, "batch words width"], Int[Array, "batch words"]]:
        """What the decoder looks at while it generates, and its mask: see decode/language.py."""
        return self.encode(self.embed(encoder_ids), encoder_mask), encoder_mask

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache for `slots` tokens a row."""
        cfg = self.config
        return empty_cache(cfg.decoder_depth, batch, slots, cfg.heads, cfg.head_dim, DTYPES[cfg.dtype])


def open_answer(inputs: Mapping[str, Any], config: T5Config) -> dict[str, Any]:
    """The start of an answer, and the text that it answers as encoder_ids and encoder_mask. Raises UserError."""
    if inputs.get("input_ids") is None or np.ndim(inputs["input_ids"]) != 2:
        raise UserError(f"input_ids has shape {np.shape(inputs.get('input_ids'))}; give [batch, tokens]")
    ids = np.asarray(inputs["input_ids"], np.int32)
    mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids)), np.int32)
    if ids.shape != mask.shape:
        raise UserError(
            f"attention_mask has shape {mask.shape}, input_ids {ids.shape}; give one of that shape"
        )
    start = np.full((len(ids), 1), config.decoder_start_token_id, np.int32)
    asked = {"encoder_ids": ids, "encoder_mask": mask}
    return {"input_ids": start, "attention_mask": np.ones_like(start), **asked}


def decoder_ids(
    labels: Int[Array | np.ndarray, "batch tokens"], config: T5Config
) -> Int[Array, "batch tokens"]:
    """What a decoder reads to learn labels: they begin one later, after the start; labels of -100 become padding."""
    labels = jnp.asarray(labels)
    words = jnp.where(labels < 0, config.pad_token_id, labels)
    start = jnp.full((labels.shape[0], 1), config.decoder_start_token_id, words.dtype)
    return jnp.concatenate([start, words[:, :-1]], axis=1)


def example_inputs(model: T5) -> dict[str, Any]:
    """What `model.init` needs to make all parameters."""
    ids = np.zeros((1, 1), np.int32)
    return {"input_ids": ids, "decoder_input_ids": ids}


def _seen(mask: Any) -> Bool[Array, "batch 1 1 keys"] | None:
    return None if mask is None else padding_mask(jnp.asarray(mask))
