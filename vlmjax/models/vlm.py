"""A vision-language model by composition: an image tower, a bridge, and a language model that reads both."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlmjax.errors import RecipeError, UserError
from vlmjax.models.bridges import Bridge, BridgeConfig
from vlmjax.models.cache import Cache
from vlmjax.models.decoder import Decoder, DecoderConfig, text_places
from vlmjax.models.layers import Ids
from vlmjax.models.t5 import T5, open_answer
from vlmjax.models.t5_layers import T5Config
from vlmjax.models.vit import Vit, VitConfig

Pixels = Float[Array | np.ndarray, "batch slots rows columns 3"]


@dataclasses.dataclass(frozen=True)
class VlmConfig:
    """The parts, and how the language model meets the image.

    Attributes:
      image: the tower.
      text: the language model.
      bridge: what lies between.
      image_token_id: the placeholder; a text has one for every token that an image becomes.
      feature_layers: hidden states of the tower that the bridge reads, side by side; 0 is what the first block reads,
        -1 what the last one leaves, -2 what the last but one leaves (LLaVA, 2304.08485, section 4.1).
      keep_class: whether the class token is one of the features.
    """

    image: VitConfig
    text: DecoderConfig | T5Config
    bridge: BridgeConfig
    image_token_id: int
    feature_layers: tuple[int, ...] = (-2,)
    keep_class: bool = False

    def __post_init__(self):
        """Refuse what cannot be built."""
        states = self.image.depth + 1
        for layer in self.feature_layers:
            if not -states <= layer < states:
                raise RecipeError(
                    f"VlmConfig.feature_layers has {layer}; the tower has {states} hidden states, "
                    f"-{states} to {states - 1}"
                )
        if not self.feature_layers:
            raise RecipeError("VlmConfig.feature_layers is empty; name at least one hidden state, such as -2")
        if self.image_token_id < 0:
            raise RecipeError(f"VlmConfig.image_token_id is {self.image_token_id}; give the id of a token")
        if self.keep_class and not self.image.class_token:
            raise RecipeError("VlmConfig.keep_class: this tower has no class token; leave it out")

    @property
    def image_tokens(self) -> int:
        """Placeholders that stand for one image."""
        return self.bridge.tokens(math.prod(self.image.grid) + self.keep_class)


class Seeing(nn.Module):
    """The three parts, and texts with images for either kind of language model."""

    config: VlmConfig

    def setup(self):
        """Build them."""
        cfg = self.config
        self.vision_model = Vit(cfg.image)
        self.bridge = Bridge(cfg.bridge, cfg.text.width)
        self.language_model = (T5 if isinstance(cfg.text, T5Config) else Decoder)(cfg.text)

    def image_features(
        self, pixel_values: Float[Array | np.ndarray, "images rows columns 3"]
    ) -> Float[Array, "images tokens width"]:
        """What normalised images become for the language model."""
        cfg = self.config
        features = self.vision_model(pixel_values, layers=cfg.feature_layers).features
        if cfg.image.class_token and not cfg.keep_class:
            features = features[:, 1:]
        return self.bridge(features)

    def embed(
        self,
        input_ids: Ids,
        pixel_values: Pixels | None = None,
        image_index: Int[Array | np.ndarray, "batch tokens"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Embeddings of a text whose placeholders are replaced by the features of its row's images, in order.

        Args:
          input_ids: with `config.image_tokens` placeholders for each image.
          pixel_values: normalised images; None, or no slots, where rows are words alone. Slots that no placeholder
            asks for are computed and not looked at.
          image_index: which of the row's features, laid end to end, each token becomes; -1 for a word. By default the
            n-th placeholder becomes the n-th one.

        Returns:
          Embeddings; NaN for placeholders beyond a row's images (see `check_inputs`, before compilation).
        """
        ids = jnp.asarray(input_ids)
        words = self.language_model.embed(ids)
        batch, slots = (0, 0) if pixel_values is None else pixel_values.shape[:2]
        if slots == 0:
            return words
        features = self.image_features(pixel_values.reshape(batch * slots, *pixel_values.shape[2:]))
        features = features.reshape(batch, slots * features.shape[1], features.shape[2])
        if image_index is None:
            image_index = placeholder_index(ids == self.config.image_token_id)
        return place(words, features, jnp.asarray(image_index))

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Raise UserError, on the host, where placeholders and images of a batch do not belong together."""
        ids, pixels = np.asarray(inputs["input_ids"]), inputs.get("pixel_values")
        shape = (*self.config.image.image_shape, 3)
        if pixels is not None and (np.ndim(pixels) != 5 or np.shape(pixels)[2:] != shape):
            raise UserError(
                f"pixel_values has shape {np.shape(pixels)}; expected [batch, images, {', '.join(map(str, shape))}]"
            )
        check_placeholders(self.config, ids, 0 if pixels is None else np.shape(pixels)[1])


class Vlm(Seeing):
    """LLaVA and its kind. `embed`, the call and `logits` are those of a Decoder, so that it generates as one does."""

    def __call__(
        self,
        embeddings: Float[Array, "batch tokens width"],
        *,
        positions: Int[Array | np.ndarray, "batch tokens"],
        segment_ids: Int[Array | np.ndarray, "batch tokens"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch tokens embed_dim"], Cache | None]:
        """Run the language model, see `Decoder`."""
        return self.language_model(embeddings, positions=positions, segment_ids=segment_ids, cache=cache)

    def logits(self, hidden: Float[Array, "batch tokens embed_dim"]) -> Float[Array, "batch tokens vocab"]:
        """Scores of the next token, in float32."""
        return self.language_model.logits(hidden)

    def head_kernel(self) -> Float[Array, "embed_dim vocab"]:
        """The matrix from hidden states to logits."""
        return self.language_model.head_kernel()

    @property
    def decoder(self) -> Decoder:
        """What generates, once a prompt is prepared."""
        return self.language_model

    def prepare(
        self, input_ids: Ids, attention_mask: Ids | None = None, pixel_values: Pixels | None = None
    ) -> tuple[
        Float[Array, "batch tokens width"], Int[Array, "batch tokens"], Int[Array, "batch tokens"] | None
    ]:
        """Texts with their images, as a call takes them: see `Decoder.prepare`."""
        return self.embed(input_ids, pixel_values), *text_places(input_ids, attention_mask)

    def causal_lm(
        self, input_ids: Ids, attention_mask: Ids | None = None, pixel_values: Pixels | None = None
    ) -> Float[Array, "batch tokens vocab"]:
        """Logits of whole texts with their images, padded on either side."""
        embeddings, positions, segments = self.prepare(input_ids, attention_mask, pixel_values)
        hidden, _ = self(embeddings, positions=positions, segment_ids=segments)
        return self.logits(hidden)


class Seq2SeqVlm(Seeing):
    """The same around a T5: its encoder reads text and images, its decoder answers. It generates as a T5 does."""

    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        pixel_values: Pixels | None = None,
        decoder_input_ids: Int[Array | np.ndarray, "batch answer"] | None = None,
        decoder_attention_mask: Int[Array | np.ndarray, "batch answer"] | None = None,
    ) -> Float[Array, "batch answer vocab"]:
        """Scores of the token after each of an answer, see `T5`. Raises UserError without answers."""
        if decoder_input_ids is None:
            raise UserError("decoder_input_ids is missing; give the answers, or use decode.generate")
        words = self.language_model
        states = words.encode(self.embed(input_ids, pixel_values), attention_mask)
        answers = words.embed(decoder_input_ids)
        return words.logits(words.decode(answers, decoder_attention_mask, states, attention_mask)[0])

    @property
    def decoder(self) -> T5:
        """What generates, once a prompt is prepared."""
        return self.language_model

    def prompt(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What `generate` is given, made the start of an answer and what it answers, on the host. Raises UserError."""
        found = open_answer(inputs, self.config.text)
        self.check_inputs(inputs)
        pixels = inputs.get("pixel_values")
        return found if pixels is None else {**found, "pixel_values": pixels}

    def context(
        self,
        encoder_ids: Int[Array, "batch words"],
        encoder_mask: Int[Array, "batch words"],
        pixel_values: Pixels | None = None,
        **_: Any,
    ) -> tuple[Float[Array, "batch words width"], Int[Array, "batch words"]]:
        """What the decoder looks at while it generates, and its mask: see decode/language.py."""
        return self.language_model.encode(self.embed(encoder_ids, pixel_values), encoder_mask), encoder_mask


def place(
    words: Float[Array, "batch tokens width"],
    features: Float[Array, "batch features width"],
    index: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens width"]:
    """Words, and in the place of those with an index of at least 0 that feature of their row; NaN beyond the last."""
    is_image = (index >= 0)[..., None]
    chosen = jnp.take_along_axis(
        features, jnp.maximum(index, 0)[..., None], axis=1, mode="fill", fill_value=jnp.nan
    )
    return jnp.where(is_image, chosen.astype(words.dtype), words)


def placeholder_index(is_image: Bool[Array, "batch tokens"]) -> Int[Array, "batch tokens"]:
    """0, 1, 2, ... on the placeholders of each row, -1 elsewhere."""
    return jnp.where(is_image, jnp.cumsum(is_image.astype(jnp.int32), axis=1) - 1, -1)


def check_placeholders(config: VlmConfig, input_ids: np.ndarray, slots: int) -> None:
    """Raise UserError unless every row has placeholders for whole images, and for no more than it has slots.

    Args:
      config: of the model.
      input_ids: int [batch, tokens], on the host.
      slots: images of each row, of which the last may stand empty.
    """
    found = (input_ids == config.image_token_id).sum(axis=1)
    for row, placeholders in enumerate(found.tolist()):
        if placeholders % config.image_tokens or placeholders > slots * config.image_tokens:
            raise UserError(
                f"row {row} has {placeholders} image placeholders (id {config.image_token_id}) and at most {slots} "
                f"image(s); {config.image_tokens} belong to each image: write one <image> for each, which the "
                "processor expands"
            )


def deal(config: VlmConfig, input_ids: np.ndarray, pixel_values: np.ndarray) -> np.ndarray:
    """Images one after the other, as Hugging Face's processors give them, dealt out to the rows that ask for them.

    Args:
      config: of the model.
      input_ids: int [batch, tokens].
      pixel_values: [images, height, width, 3].

    Returns:
      [batch, slots, height, width, 3] with as many slots as the row with the most images, at least one; zeros in slots
      of rows that have fewer.

    Raises:
      UserError: rows ask for another number of images than there are.
    """
    counts = (np.asarray(input_ids) == config.image_token_id).sum(axis=1) / config.image_tokens
    whole = counts.astype(int)
    if (counts != whole).any() or whole.sum() != len(pixel_values):
        raise UserError(
            f"the texts have placeholders for {counts.sum():g} image(s) of {config.image_tokens} tokens, but there are "
            f"{len(pixel_values)} image(s): give one <image> for each"
        )
    out = np.zeros((len(whole), max(1, whole.max(initial=0)), *pixel_values.shape[1:]), pixel_values.dtype)
    for row, (count, end) in enumerate(zip(whole, np.cumsum(whole), strict=True)):
        out[row, :count] = pixel_values[end - count : end]
    return out


def vlm_of(config: VlmConfig) -> Vlm | Seq2SeqVlm:
    """The model of a configuration, by its language model."""
    return (Seq2SeqVlm if isinstance(config.text, T5Config) else Vlm)(config)


def example_inputs(config: VlmConfig) -> dict[str, Any]:
    """What `vlm_of(config).init` needs to make all parameters."""
    writes = isinstance(config.text, T5Config)
    return {
        **({"decoder_input_ids": np.zeros((1, 1), np.int32)} if writes else {"method": "causal_lm"}),
        "input_ids": np.full((1, 1), config.image_token_id, np.int32),
        "pixel_values": np.zeros((1, 1, *config.image.image_shape, 3), np.float32),
    }
