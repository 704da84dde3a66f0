"""BLIP (2201.12086): one image tower and one text transformer that understand (ITC, ITM) and write (LM).

`Blip` is the model of pretraining. `BlipCaptioner` and `BlipRetriever` are its halves: their parameters are some of
its parameters, under the same names. VQA and NLVR2 are in models/blip_tasks.py, and how a model begins with the
parameters of another in models/blip_start.py.

Calling a model is calling the transformers class of its form: token ids are taken as they are. The methods are the
paper's: `encode_multimodal` begins a text with [ENC], `decode_text` with [DEC].
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlmjax.errors import RecipeError
from vlmjax.models.bert import INIT
from vlmjax.models.blip_config import TEMPERATURE, TEMPERATURES, BlipConfig
from vlmjax.models.blip_inputs import blank, check_images, open_prompt
from vlmjax.models.layers import Ids
from vlmjax.models.med import Med, first_token
from vlmjax.models.outputs import BlipFeatures
from vlmjax.models.vit import Vit
from vlmjax.ops.norms import l2_normalize
from vlmjax.sharding.activations import constrain

Pixels = Float[Array | np.ndarray, "batch height width channels"]
ImageStates = Float[Array, "images states image_width"]
MODES = ("image", "text", "multimodal")


class Images(nn.Module):
    """The image tower, which every form has."""

    config: BlipConfig

    def setup(self):
        """Build it."""
        self.vision_model = Vit(self.config.image)

    def encode_image(self, pixel_values: Pixels, train: bool = False) -> ImageStates:
        """Normalised states of images, class token first. With `train`, drop_path draws from the "dropout" rng."""
        return self.vision_model(pixel_values, train=train).last_hidden_state


class _Texts(Images):
    """With one text transformer."""

    def setup(self):
        """Build both."""
        super().setup()
        self.text_model = Med(self.config.text)


class BlipCaptioner(_Texts):
    """Tower and image-grounded decoder: BlipForConditionalGeneration. `decode.generate` writes with it."""

    def __call__(
        self,
        pixel_values: Pixels,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch tokens vocab"]:
        """Scores of the token after each; ids are taken as they are."""
        states = self.encode_image(pixel_values, train)
        return self.logits(self._decode(states, jnp.asarray(input_ids), attention_mask, train))

    def decode_text(
        self,
        image_states: ImageStates,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        train: bool = False,
    ) -> Float[Array, "batch tokens width"]:
        """States of texts that are written about images, beginning with [DEC]; `logits` makes scores of them."""
        ids = first_token(input_ids, attention_mask, self.config.bos_token_id)
        return self._decode(image_states, ids, attention_mask, train)

    def logits(self, hidden: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens vocab"]:
        """Scores of the next token, in float32."""
        return self.text_model.logits(hidden)

    def _decode(
        self, states: ImageStates, ids: Array, attention_mask: Ids | None, train: bool
    ) -> Float[Array, "batch tokens width"]:
        embeddings = self.text_model.embed(ids, train=train)
        return self.text_model.decode(embeddings, attention_mask, states, train=train)[0]

    @property
    def decoder(self) -> Med:
        """What generates, once a prompt is prepared."""
        return self.text_model

    def context(self, pixel_values: Pixels, **_: Any) -> tuple[ImageStates, None]:
        """What the decoder looks at while it generates, and its mask: see decode/language.py."""
        return self.encode_image(pixel_values), None

    def prompt(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What `generate` is given, made a prompt that can go on, on the host.

        A tokenizer writes [CLS] a picture of [SEP]; the caption goes on after [DEC] a picture of. Without input_ids
        the prompt is [DEC]. Raises UserError.
        """
        check_images(inputs, self.config)
        return {**inputs, **open_prompt(inputs, self.config)}


class BlipRetriever(_Texts):
    """Tower, text encoder and image-grounded encoder: BlipForImageTextRetrieval."""

    def setup(self):
        """Build projections, matching head and temperature too."""
        super().setup()
        cfg = self.config
        self.vision_proj = nn.Dense(cfg.projection_dim, dtype=jnp.float32, kernel_init=INIT)
        self.text_proj = nn.Dense(cfg.projection_dim, dtype=jnp.float32, kernel_init=INIT)
        self.itm_head = nn.Dense(2, dtype=jnp.float32, kernel_init=INIT)
        if self.is_initializing():
            # Read by the loss alone, as params["temp"]: momentum copies do without.
            self.param("temp", nn.initializers.constant(TEMPERATURE), (), jnp.float32)

    def __call__(
        self,
        pixel_values: Pixels,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        *,
        use_itm_head: bool = True,
        train: bool = False,
    ) -> Float[Array, "images scores"]:
        """Scores of transformers' `itm_score`; ids are taken as they are.

        Returns:
          with `use_itm_head` logits of (no match, match) [batch, 2] of image and text of each row; without, cosines
          of all images with all texts [images, texts].
        """
        states = self.encode_image(pixel_values, train)
        if use_itm_head:
            texts = self.text_model.encode(input_ids, attention_mask, states, train=train)
            return self.itm_head(texts[:, 0].astype(jnp.float32))
        texts = self.encode_text(input_ids, attention_mask, train)
        images, texts = self.embed_image(states), self.embed_text(texts)
        return jnp.matmul(images, texts.T, precision=jax.lax.Precision.HIGHEST)

    def encode_text(
        self, input_ids: Ids, attention_mask: Ids | None = None, train: bool = False
    ) -> Float[Array, "batch tokens width"]:
        """States of texts alone, which begin with [CLS]."""
        return self.text_model.encode(input_ids, attention_mask, train=train)

    def encode_multimodal(
        self,
        image_states: ImageStates,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        train: bool = False,
    ) -> Float[Array, "batch tokens width"]:
        """States of texts that look at images, row by row, beginning with [ENC]."""
        ids = first_token(input_ids, attention_mask, self.config.enc_token_id)
        return self.text_model.encode(ids, attention_mask, image_states, train=train)

    def embed_image(self, image_states: ImageStates) -> Float[Array, "images dim"]:
        """Images in the common space: float32, unit length."""
        return _unit(self.vision_proj, image_states[:, 0])

    def embed_text(self, text_states: Float[Array, "texts tokens width"]) -> Float[Array, "texts dim"]:
        """Texts in the common space, of their first token: float32, unit length."""
        return _unit(self.text_proj, text_states[:, 0])

    def match(
        self,
        image_states: ImageStates,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        train: bool = False,
    ) -> Float[Array, "batch 2"]:
        """Logits of (no match, match) of image and text of each row, in float32: what ITM learns."""
        states = self.encode_multimodal(image_states, input_ids, attention_mask, train)
        return self.itm_head(constrain(states[:, 0].astype(jnp.float32), "batch", None))

    def features(
        self,
        mode: str = "multimodal",
        pixel_values: Pixels | None = None,
        input_ids: Ids | None = None,
        attention_mask: Ids | None = None,
    ) -> BlipFeatures:
        """Features of all tokens: `image`, `text`, or `multimodal`, of texts that look at images.

        Raises:
          RecipeError: another mode, or an input that the mode needs is not there.
        """
        needed = {"pixel_values": pixel_values} if mode != "text" else {}
        needed |= {"input_ids": input_ids} if mode != "image" else {}
        if mode not in MODES or any(value is None for value in needed.values()):
            missing = ", ".join(name for name, value in needed.items() if value is None) or "nothing"
            raise RecipeError(
                f"features of mode {mode!r} cannot be made ({missing} is missing): choose one of {', '.join(MODES)}; "
                "image needs pixel_values, text needs input_ids, multimodal both"
            )
        if mode == "text":
            states = self.encode_text(input_ids, attention_mask)
            return BlipFeatures(text_embeds=states, text_features=_unit(self.text_proj, states))
        states = self.encode_image(pixel_values)
        if mode == "image":
            return BlipFeatures(image_embeds=states, image_features=_unit(self.vision_proj, states))
        joint = self.encode_multimodal(states, input_ids, attention_mask)
        return BlipFeatures(image_embeds=states, multimodal_embeds=joint)


class Blip(BlipRetriever, BlipCaptioner):
    """Everything that pretraining needs: both halves over one text transformer. Its call is a BlipRetriever's."""


def _unit(projection: nn.Dense, states: Float[Array, "*rows width"]) -> Float[Array, "*rows dim"]:
    projected = projection(states.astype(jnp.float32))
    return l2_normalize(constrain(projected, "batch", *[None] * (projected.ndim - 1)))


def clamp_temperature(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with the temperature, `temp`, held within TEMPERATURES, as BLIP holds it before every step."""
    return {**params, "temp": jnp.clip(params["temp"], *TEMPERATURES)}


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """What `model.init` needs to make all parameters, for any of the three."""
    pixels, ids = blank(model.config)

    def everything(module: nn.Module) -> None:
        states = module.encode_image(pixels)
        if isinstance(module, BlipRetriever):
            module.embed_image(states), module.embed_text(module.encode_text(ids)), module.match(states, ids)
        if isinstance(module, BlipCaptioner):
            module.logits(module.decode_text(states, ids))

    return {"method": everything}
