"""What generation asks of a model, and the answers of every model around a Decoder, a Med and a T5."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlmjax.decode.prompts import bucket, checked_mask
from vlmjax.errors import UserError
from vlmjax.models.cache import Cache
from vlmjax.models.decoder import Decoder, DecoderConfig, init_cache
from vlmjax.models.med import Med
from vlmjax.models.t5 import T5
from vlmjax.models.t5_layers import T5Config

Params = Mapping[str, Any]


class Prompt(NamedTuple):
    """A batch of prompts, images included, as the layers of a decoder take it.

    Attributes:
      positions: of each token; with several axes (M-RoPE), one position per axis.
      segment_ids: 1 on tokens, 0 on padding, which may stand on either side.
      context: what the tokens also look at, states of an image for one, and its mask (1 on what is no padding; None:
        all of it). The cache remembers it, so tokens that follow a prompt come without.
    """

    embeddings: Float[Array, "batch tokens width"]
    positions: Int[Array, "batch tokens *axes"]
    segment_ids: Int[Array, "batch tokens"]
    context: tuple[Float[Array, "batch states width"], Int[Array, "batch states"] | None] | None = None


@runtime_checkable
class Language(Protocol):
    """What generation asks of a model. A model that has a method `language` gives its own; see `language_of`."""

    def inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What a user gives, made what `prepare` takes: on the host, before anything is padded. Raises UserError."""
        ...

    def prepare(self, params: Params, inputs: Mapping[str, Any]) -> Prompt:
        """Embed the prompts: `input_ids`, `attention_mask`, and what else the model takes."""
        ...

    def cache(self, params: Params, batch: int, slots: int) -> Cache:
        """An empty cache."""
        ...

    def run(
        self, params: Params, prompt: Prompt, cache: Cache
    ) -> tuple[Float[Array, "batch tokens width"], Cache]:
        """Hidden states of more tokens, and the cache with them."""
        ...

    def embed(
        self, params: Params, tokens: Int[Array, "batch tokens"], positions: Int[Array, "batch tokens"]
    ) -> Prompt:
        """Tokens that follow a prompt, as `run` takes them; `positions` go on from the largest of the prompt."""
        ...

    def logits(
        self, params: Params, hidden: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens vocab"]:
        """Scores of the next token, in float32."""
        ...

    def room(self, params: Params) -> int | None:
        """How many positions a row has; None where they have no limit."""
        ...


@dataclasses.dataclass(frozen=True)
class DecoderLanguage:
    """A Decoder, or a linen module that holds one as `decoder`; its method `prepare` makes prompts of inputs.

    `prepare(**inputs)` returns embeddings, positions and segment_ids (None: no padding), as Decoder's does.
    """

    model: nn.Module

    def _apply(self, params: Params, method: Any, *arguments: Any) -> Any:
        return self.model.apply({"params": params}, *arguments, method=method)

    def inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """See Language."""
        checked_mask(inputs)
        if hasattr(self.model, "check_inputs"):
            self.model.check_inputs(inputs)
        return dict(inputs)

    def prepare(self, params: Params, inputs: Mapping[str, Any]) -> Prompt:
        """See Language."""
        embeddings, positions, segments = self._apply(params, lambda m: m.prepare(**inputs))
        segments = jnp.ones(embeddings.shape[:2], jnp.int32) if segments is None else segments
        return Prompt(embeddings, positions, segments)

    def cache(self, params: Params, batch: int, slots: int) -> Cache:
        """See Language."""
        return self._apply(params, lambda m: init_cache(_decoder(m).config, batch, slots))

    def run(
        self, params: Params, prompt: Prompt, cache: Cache
    ) -> tuple[Float[Array, "batch tokens width"], Cache]:
        """See Language."""

        def call(module: nn.Module) -> Any:
            places = {"positions": prompt.positions, "segment_ids": prompt.segment_ids}
            return _decoder(module)(prompt.embeddings, **places, cache=cache)

        return self._apply(params, call)

    def embed(
        self, params: Params, tokens: Int[Array, "batch tokens"], positions: Int[Array, "batch tokens"]
    ) -> Prompt:
        """See Language."""
        embeddings = self._apply(params, lambda m: _decoder(m).embed(tokens))
        return Prompt(embeddings, positions, jnp.ones(tokens.shape, jnp.int32))

    def logits(
        self, params: Params, hidden: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens vocab"]:
        """See Language."""
        return self._apply(params, lambda m: _decoder(m).logits(hidden))

    def room(self, params: Params) -> int | None:
        """See Language."""
        config = self.config(params)
        return config.max_length if config.rope is None else None

    def config(self, params: Params) -> DecoderConfig:
        """The decoder's configuration; nothing is computed."""
        found = []
        jax.eval_shape(lambda p: self._apply(p, lambda m: found.append(_decoder(m).config)), params)
        return found[0]


@dataclasses.dataclass(frozen=True)
class GroundedLanguage:
    """A T5, or a linen module that holds one or a Med as `decoder`: tokens look at what `context` makes of inputs.

    `context(**inputs)` returns states and their mask (1 on what is no padding; None: all of them);
    `prompt(inputs)` is `Language.inputs`. Positions count from the first column of a prompt, as in BERT.
    """

    model: nn.Module

    def _apply(self, params: Params, method: Any) -> Any:
        return self.model.apply({"params": params}, method=method)

    def inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """See Language. Texts beside the prompt, a question, are padded to a length that many share."""
        found = self.model.prompt(inputs)
        beside = [name for name in found if name not in ("input_ids", "attention_mask")]
        for name in filter(lambda name: np.ndim(found[name]) == 2, beside):
            tokens, room = found[name].shape[1], self.room({})
            longest = bucket(tokens) if room is None else min(bucket(tokens), room)
            more = max(0, longest - tokens)
            found[name] = np.pad(found[name], [(0, 0), (0, more)])
        return found

    def prepare(self, params: Params, inputs: Mapping[str, Any]) -> Prompt:
        """See Language."""
        ids = jnp.asarray(inputs["input_ids"])
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
        prompt = self.embed(params, ids, positions)
        context = self._apply(params, lambda m: m.context(**inputs))
        return prompt._replace(segment_ids=jnp.asarray(inputs["attention_mask"]), context=context)

    def cache(self, params: Params, batch: int, slots: int) -> Cache:
        """See Language."""
        return self._apply(params, lambda m: _writer(m).empty_cache(batch, slots))

    def run(
        self, params: Params, prompt: Prompt, cache: Cache
    ) -> tuple[Float[Array, "batch tokens width"], Cache]:
        """See Language."""
        context, mask = prompt.context or (None, None)
        words, places = (prompt.embeddings, prompt.segment_ids), prompt.positions

        def call(module: nn.Module) -> Any:
            return _writer(module).decode(*words, context, mask, cache=cache, positions=places)

        return self._apply(params, call)

    def embed(
        self, params: Params, tokens: Int[Array, "batch tokens"], positions: Int[Array, "batch tokens"]
    ) -> Prompt:
        """See Language. Padding may lie beyond the last position: it is no NaN, which a mask would not keep out."""
        room = self.room(params)
        places = positions if room is None else jnp.minimum(positions, room - 1)
        embeddings = self._apply(params, lambda m: _writer(m).embed(tokens, places))
        return Prompt(embeddings, positions, jnp.ones(tokens.shape, jnp.int32))

    def logits(
        self, params: Params, hidden: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens vocab"]:
        """See Language."""
        return self._apply(params, lambda m: _writer(m).logits(hidden))

    def room(self, params: Params) -> int | None:
        """See Language."""
        words = getattr(self.model.config, "text", self.model.config)
        return None if isinstance(words, T5Config) else words.max_length


def _decoder(module: nn.Module) -> Decoder:
    return module if isinstance(module, Decoder) else module.decoder


def _writer(module: nn.Module) -> Med | T5:
    return module if isinstance(module, T5) else module.decoder


def language_of(model: nn.Module) -> Language:
    """How to generate with a model. Raises UserError for one that is no language model."""
    if hasattr(model, "language"):
        return model.language()
    if hasattr(model, "context"):
        return GroundedLanguage(model)
    if not hasattr(model, "prepare"):
        raise UserError(
            f"{type(model).__name__} has no method `prepare`: it is no language model, so it cannot write text"
        )
    return DecoderLanguage(model)


class Prefilled(NamedTuple):
    """A batch of prompts that a model has read."""

    cache: Cache
    logits: Float[Array, "batch vocab"]  # of the token after each prompt
    positions: Int[Array, " batch"]  # of the token after each prompt


def prefill(language: Language, params: Params, inputs: Mapping[str, Any], more: int) -> Prefilled:
    """Read prompts into a cache that has `more` slots after them."""
    prompt = language.prepare(params, inputs)
    batch, tokens = prompt.segment_ids.shape
    hidden, cache = language.run(params, prompt, language.cache(params, batch, tokens + more))
    real = prompt.segment_ids != 0
    last = tokens - 1 - jnp.argmax(real[:, ::-1], axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    shown = jnp.where(real.reshape(*real.shape, *[1] * (prompt.positions.ndim - 2)), prompt.positions, -1)
    positions = shown.max(axis=tuple(range(1, shown.ndim))) + 1
    return Prefilled(cache, language.logits(params, hidden)[:, 0], positions.astype(jnp.int32))


def advance(
    language: Language,
    params: Params,
    tokens: Int[Array, " batch"],
    positions: Int[Array, " batch"],
    cache: Cache,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """One more token per row: scores of the token after it, and the cache with it."""
    hidden, cache = language.run(params, language.embed(params, tokens[:, None], positions[:, None]), cache)
    return language.logits(params, hidden)[:, 0], cache
