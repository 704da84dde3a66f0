"""BLIP's models of single tasks (2201.12086, section 5): answers to questions, and statements about two images."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlmjax.errors import UserError
from vlmjax.models.bert import (
    INIT,
    BertAttend,
    BertAttention,
    BertConfig,
    BertEmbeddings,
    BertIntermediate,
    BertJoin,
)
from vlmjax.models.blip import Images, ImageStates, Pixels
from vlmjax.models.blip_inputs import blank, check_images
from vlmjax.models.layers import DTYPES, Ids, LayerNorm, check_length, stack, stream
from vlmjax.models.med import Med, first_token
from vlmjax.ops.attention import padding_mask

QuestionMask = Int[Array | np.ndarray, "questions words"]
# Layers from this one on merge what they saw of two images by a projection, those before by the mean
# (salesforce/BLIP, models/nlvr_encoder.py: 6 of 12).
MERGING_SHARE = 2


# ---- visual question answering


class BlipVqa(Images):
    """A question encoder that looks at the image, and an answer decoder that looks at the question's states.

    The two share nothing: both begin as the one text transformer of pretraining. BlipForQuestionAnswering, where
    states of texts and images have one width. `decode.generate` writes answers, `decode.rank` scores given ones; both
    take the question as `input_ids`, `attention_mask`, `pixel_values`.
    """

    def setup(self):
        """Build the three parts."""
        super().setup()
        self.text_encoder = Med(self.config.text)
        self.text_decoder = Med(self.config.text)

    def __call__(
        self,
        pixel_values: Pixels,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        decoder_input_ids: Int[Array | np.ndarray, "batch answer"] | None = None,
        decoder_attention_mask: Int[Array | np.ndarray, "batch answer"] | None = None,
        *,
        cross_attention_mask: Ids | None = None,
        train: bool = False,
    ) -> Float[Array, "batch answer vocab"]:
        """Scores of the token after each of an answer; ids are taken as they are. Raises UserError without answers.

        Answers see all states of a question, padding too, as in transformers 5, where the mask does not arrive at
        cross-attention; with a `cross_attention_mask` (attention_mask itself for one) those it keeps.
        """
        if decoder_input_ids is None:
            raise UserError("decoder_input_ids is missing; give the answers, or use decode.generate")
        states = self.text_encoder.encode(
            input_ids, attention_mask, self.encode_image(pixel_values, train), train=train
        )
        answers = jnp.asarray(decoder_input_ids)
        return self.logits(self._decode(states, cross_attention_mask, answers, decoder_attention_mask, train))

    def encode_question(
        self,
        image_states: ImageStates,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        train: bool = False,
    ) -> Float[Array, "batch words width"]:
        """States of questions that look at their images, beginning with [ENC]."""
        ids = first_token(input_ids, attention_mask, self.config.enc_token_id)
        return self.text_encoder.encode(ids, attention_mask, image_states, train=train)

    def decode_answer(
        self,
        question_states: Float[Array, "questions words width"],
        question_mask: QuestionMask | None,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        train: bool = False,
    ) -> Float[Array, "batch tokens width"]:
        """States of answers, beginning with [DEC]; `logits` makes scores of them.

        Where each question has as many answers, they are rows side by side: its states are not repeated.
        """
        ids = first_token(input_ids, attention_mask, self.config.bos_token_id)
        return self._decode(question_states, question_mask, ids, attention_mask, train)

    def logits(self, hidden: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens vocab"]:
        """Scores of the next token, in float32."""
        return self.text_decoder.logits(hidden)

    def _decode(
        self,
        states: Float[Array, "questions words width"],
        question_mask: QuestionMask | None,
        ids: Array,
        attention_mask: Ids | None,
        train: bool,
    ) -> Float[Array, "batch tokens width"]:
        embeddings = self.text_decoder.embed(ids, train=train)
        return self.text_decoder.decode(embeddings, attention_mask, states, question_mask, train=train)[0]

    @property
    def decoder(self) -> Med:
        """What generates, once a prompt is prepared."""
        return self.text_decoder

    def prompt(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What `generate` is given, made a prompt, [DEC], and what it looks at, on the host.

        `cross_attention_mask` says which of a question's states the answer sees, by default those of its tokens;
        transformers' generate lets it see padding too: ones. Raises UserError.
        """
        check_images(inputs, self.config)
        if inputs.get("input_ids") is None:
            raise UserError("input_ids is missing; give a question for each image")
        ids = np.asarray(inputs["input_ids"], np.int32)
        mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids)), np.int32)
        seen = np.asarray(inputs.get("cross_attention_mask", mask), np.int32)
        if not ids.shape == mask.shape == seen.shape:
            raise UserError(
                f"attention_mask has shape {mask.shape}, cross_attention_mask {seen.shape}, input_ids {ids.shape}; "
                "give all of one shape"
            )
        return self.asked(ids, mask, inputs["pixel_values"], seen)

    def asked(
        self, input_ids: Any, attention_mask: Any, pixel_values: Any, cross_attention_mask: Any = None
    ) -> dict[str, Any]:
        """A prepared prompt: arguments as of `prompt`, checked or traced."""
        start = jnp.full((input_ids.shape[0], 1), self.config.bos_token_id, jnp.int32)
        seen = attention_mask if cross_attention_mask is None else cross_attention_mask
        return {
            "input_ids": start,
            "attention_mask": jnp.ones_like(start),
            "question_ids": input_ids,
            "question_mask": attention_mask,
            "cross_attention_mask": seen,
            "pixel_values": pixel_values,
        }

    def context(
        self,
        question_ids: Int[Array, "batch words"],
        question_mask: Int[Array, "batch words"],
        cross_attention_mask: Int[Array, "batch words"],
        pixel_values: Pixels,
        **_: Any,
    ) -> tuple[Float[Array, "batch words text_width"], Int[Array, "batch words"]]:
        """What the decoder looks at while it generates, and its mask: see decode/language.py."""
        images = self.encode_image(pixel_values)
        return self.encode_question(images, question_ids, question_mask), cross_attention_mask


# ---- two images (NLVR2)


class TwinJoin(nn.Module):
    """What two images gave, projected each, joined by the mean or by a projection of both; then as BertJoin."""

    config: BertConfig
    merge: bool

    @nn.compact
    def __call__(
        self,
        first: Float[Array, "batch tokens width"],
        second: Float[Array, "batch tokens width"],
        residual: Float[Array, "batch tokens width"],
        train: bool,
    ) -> Float[Array, "batch tokens width"]:
        """Return the new stream."""
        cfg, dtype = self.config, DTYPES[self.config.dtype]

        def dense(name: str) -> nn.Dense:
            return nn.Dense(cfg.width, dtype=dtype, kernel_init=INIT, name=name)

        first, second = dense("dense0")(first), dense("dense1")(second)
        if self.merge:
            x = dense("merge_layer")(jnp.concatenate([first, second], axis=-1))
        else:
            x = (first + second) / 2
        x = nn.Dropout(cfg.dropout, deterministic=not train)(x)
        return stream(LayerNorm(cfg.layer_norm_eps, dtype, name="LayerNorm")(x + residual))


class TwinAttention(nn.Module):
    """Cross-attention over two images, by one branch each."""

    config: BertConfig
    merge: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        images: Float[Array, "batch 2 states image_width"],
        train: bool,
    ) -> Float[Array, "batch tokens width"]:
        """Attend and join."""
        mixed = []
        for i in range(2):
            attend = BertAttend(self.config, name=f"self{i}")
            mixed.append(attend(x, *attend.keys_values(images[:, i]), None, train))
        return TwinJoin(self.config, self.merge, name="output")(*mixed, x, train)


class TwinLayer(nn.Module):
    """Self-attention, a look at two images, an MLP."""

    config: BertConfig
    merge: bool
    train: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        told: tuple[Any, Float[Array, "batch 2 states image_width"]],
    ) -> tuple[Float[Array, "batch tokens width"], None]:
        """Return the stream after this layer, and nothing else for the scan to collect."""
        mask, images = told
        own = BertAttention(self.config, name="attention")
        x = own(x, *own.keys_values(x), mask, self.train)
        x = TwinAttention(self.config, self.merge, name="crossattention")(x, images, self.train)
        hidden = BertIntermediate(self.config, name="intermediate")(x)
        return BertJoin(self.config, name="output")(hidden, x, self.train), None


class TwinEncoder(nn.Module):
    """Texts that look at two images: the first half of the layers takes the mean of what they see, the rest merges."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None,
        images: Float[Array, "batch 2 states image_width"],
        train: bool,
    ) -> Float[Array, "batch tokens width"]:
        """States of texts. Raises UserError for more tokens than positions."""
        cfg = self.config
        check_length(input_ids, cfg.max_length)
        mask = None if attention_mask is None else padding_mask(jnp.asarray(attention_mask))
        x = BertEmbeddings(cfg, name="embeddings")(input_ids, train=train)
        for name, (start, end) in twin_layers(cfg.depth).items():
            layers = stack(TwinLayer, end - start, cfg.remat)
            x, _ = layers(cfg, name == "merging", train, name=name)(x, (mask, images))
        return x


def twin_layers(depth: int) -> dict[str, tuple[int, int]]:
    """Which layers (first, end) take the mean and which merge."""
    middle = depth // MERGING_SHARE
    return {"averaging": (0, middle), "merging": (middle, depth)}


class BlipNlvr(Images):
    """Whether a statement about two images is true (NLVR2): no class of transformers has its twin cross-attention."""

    def setup(self):
        """Build tower, text encoder and head."""
        super().setup()
        self.text_encoder = TwinEncoder(self.config.text)
        self.cls_dense = nn.Dense(self.config.text.width, dtype=jnp.float32, kernel_init=INIT)
        self.cls_out = nn.Dense(2, dtype=jnp.float32, kernel_init=INIT)

    def __call__(
        self,
        pixel_values: Float[Array | np.ndarray, "batch 2 height width channels"],
        input_ids: Ids,
        attention_mask: Ids | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch 2"]:
        """Logits of (false, true), in float32. The text begins with [ENC]."""
        batch = pixel_values.shape[0]
        states = self.encode_image(pixel_values.reshape(2 * batch, *pixel_values.shape[2:]), train)
        ids = first_token(input_ids, attention_mask, self.config.enc_token_id)
        texts = self.text_encoder(ids, attention_mask, states.reshape(batch, 2, *states.shape[1:]), train)
        return self.cls_out(nn.relu(self.cls_dense(texts[:, 0].astype(jnp.float32))))

    def judge(self, *inputs: Any) -> Float[Array, "batch 2"]:
        """As a call: a name by which this form can be told."""
        return self(*inputs)


def example_inputs(model: BlipVqa | BlipNlvr) -> dict[str, Any]:
    """What `model.init` needs to make all parameters."""
    pixels, ids = blank(model.config)
    if isinstance(model, BlipVqa):
        return {"pixel_values": pixels, "input_ids": ids, "decoder_input_ids": ids}
    return {"pixel_values": np.stack([pixels, pixels], axis=1), "input_ids": ids}
