"""CLIP: an image tower and a text tower meeting in one embedding space."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlmjax.errors import RecipeError, UserError
from vlmjax.models.bert import Bert, BertConfig
from vlmjax.models.outputs import ClipOutput, TextOutput, TowerOutput, VisionOutput
from vlmjax.models.text import Text, TextConfig
from vlmjax.models.vit import Vit, VitConfig
from vlmjax.ops.norms import l2_normalize
from vlmjax.sharding.activations import constrain

Pixels = Float[Array | np.ndarray, "_ height width channels"]
Ids = Int[Array | np.ndarray, "_ tokens"]


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Two towers and the space they share. `logit_scale_init` is a logarithm, ln(1/0.07) in the paper."""

    image: VitConfig
    text: TextConfig | BertConfig
    projection_dim: int
    logit_scale_init: float = 2.6592

    def __post_init__(self):
        """Refuse what cannot be built."""
        if self.projection_dim < 1:
            raise RecipeError(f"ClipConfig.projection_dim is {self.projection_dim}; give a positive number")


def projection(width: int, features: int, name: str | None = None) -> nn.Dense:
    """From a tower's state into the space that both share."""
    # Std width^-0.5 as in openai/CLIP's initialize_parameters. One row per example: float32 is free.
    init = nn.initializers.normal(width**-0.5)
    return nn.Dense(features, use_bias=False, dtype=jnp.float32, kernel_init=init, name=name)


class Clip(nn.Module):
    """Dual encoder: CLIPModel with a TextConfig, VisionTextDualEncoderModel with a BertConfig."""

    config: ClipConfig

    def setup(self):
        """Build towers, projections and the temperature."""
        cfg = self.config
        self.vision_model = Vit(cfg.image)
        self.text_model = Bert(cfg.text) if isinstance(cfg.text, BertConfig) else Text(cfg.text)
        self.visual_projection = projection(cfg.image.width, cfg.projection_dim)
        self.text_projection = projection(cfg.text.width, cfg.projection_dim)
        self.logit_scale = self.param(
            "logit_scale", nn.initializers.constant(cfg.logit_scale_init), (), jnp.float32
        )

    def __call__(
        self,
        pixel_values: Pixels | None = None,
        input_ids: Ids | None = None,
        attention_mask: Ids | None = None,
        position_ids: Ids | None = None,
        token_type_ids: Ids | None = None,
        *,
        train: bool = False,
    ) -> ClipOutput:
        """Encode images, texts or both; logits need both.

        `pixel_values` [images, height, width, 3] are normalised floats; another size than the config's works.
        `token_type_ids` are for a BERT text tower. With `train`, dropout and patch dropout draw from the
        "dropout" rng.
        """
        images = texts = image_embeds = text_embeds = per_image = None
        if pixel_values is not None:
            images = self.vision_model(pixel_values, train=train)
            image_embeds = unit(self.visual_projection(images.pooler_output))
        if input_ids is not None:
            texts = self._text(input_ids, attention_mask, position_ids, token_type_ids, train)
            text_embeds = unit(self.text_projection(texts.pooler_output))
        if image_embeds is not None and text_embeds is not None:
            per_image = similarity(image_embeds, text_embeds, jnp.exp(self.logit_scale))
        return ClipOutput(
            logits_per_image=per_image,
            logits_per_text=None if per_image is None else per_image.T,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            vision_model_output=images,
            text_model_output=texts,
        )

    def encode_image(
        self, pixel_values: Pixels, train: bool = False
    ) -> Float[Array, "images projection_dim"]:
        """Embed normalised images: float32, unit length. Use as `apply(..., method="encode_image")`."""
        return self(pixel_values=pixel_values, train=train).image_embeds

    def encode_text(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        position_ids: Ids | None = None,
        token_type_ids: Ids | None = None,
        train: bool = False,
    ) -> Float[Array, "texts projection_dim"]:
        """Embed texts: float32, unit length. Use as `apply(..., method="encode_text")`."""
        out = self(None, input_ids, attention_mask, position_ids, token_type_ids, train=train)
        return out.text_embeds

    def _text(
        self,
        input_ids: Ids,
        attention_mask: Ids | None,
        position_ids: Ids | None,
        token_type_ids: Ids | None,
        train: bool,
    ) -> TowerOutput:
        if isinstance(self.config.text, BertConfig):
            return self.text_model(input_ids, attention_mask, token_type_ids, position_ids, train=train)
        if token_type_ids is not None:
            raise UserError(
                "token_type_ids were given, but CLIP's text tower has no token types; leave them out"
            )
        return self.text_model(input_ids, attention_mask, position_ids, train=train)


def unit(projected: Float[Array, "rows dim"]) -> Float[Array, "rows dim"]:
    """Scaled to unit length, where rows are compared."""
    return l2_normalize(constrain(projected, "batch", None))


def similarity(
    image_embeds: Float[Array, "images dim"],
    text_embeds: Float[Array, "texts dim"],
    logit_scale: Float[Array, ""],
) -> Float[Array, "images texts"]:
    """Scaled cosine of every image with every text, in float32 at full precision."""
    return logit_scale * jnp.matmul(image_embeds, text_embeds.T, precision=jax.lax.Precision.HIGHEST)


class ClipVision(nn.Module):
    """CLIP's image half alone: CLIPVisionModel, or CLIPVisionModelWithProjection with a `projection_dim`."""

    config: VitConfig
    projection_dim: int | None = None

    @nn.compact
    def __call__(self, pixel_values: Pixels, *, train: bool = False) -> VisionOutput:
        """Encode normalised images; image_embeds is not normalised, as in Hugging Face's class."""
        out = Vit(self.config, name="vision_model")(pixel_values, train=train)
        embeds = None
        if self.projection_dim is not None:
            project = projection(self.config.width, self.projection_dim, "visual_projection")
            embeds = project(out.pooler_output)
        return VisionOutput(out.last_hidden_state, out.pooler_output, embeds)


class ClipText(nn.Module):
    """CLIP's text half alone: CLIPTextModel, or CLIPTextModelWithProjection with a `projection_dim`."""

    config: TextConfig
    projection_dim: int | None = None

    @nn.compact
    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Ids | None = None,
        position_ids: Ids | None = None,
        *,
        train: bool = False,
    ) -> TextOutput:
        """Encode token ids; text_embeds is not normalised, as in Hugging Face's class."""
        out = Text(self.config, name="text_model")(input_ids, attention_mask, position_ids, train=train)
        embeds = None
        if self.projection_dim is not None:
            project = projection(self.config.width, self.projection_dim, "text_projection")
            embeds = project(out.pooler_output)
        return TextOutput(out.last_hidden_state, out.pooler_output, embeds)


def example_inputs(config: ClipConfig) -> dict[str, np.ndarray]:
    """One blank image and text of the right shapes: what `Clip(config).init` needs to make all parameters."""
    return {
        "pixel_values": np.zeros((1, *config.image.image_shape, 3), np.float32),
        "input_ids": np.zeros((1, config.text.max_length), np.int32),
    }
