"""BLIP (2201.12086): one image tower and one text transformer that understand (ITC, ITM) and write (LM).

`Blip` is the model of pretraining. `BlipCaptioner` and `BlipRetriever` are its halves: their parameters are some of
its parameters, under the same names. VQA and NLVR2 are in models/blip_tasks.py, and how a model begins with the
parameters of another in models/blip_start.py.

Calling a model is calling the transformers class of its form: token ids are taken as they are. The methods are the
paper's: `encode_multimodal` begins a text with [ENC], `decode_text` with [DEC].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlmjax.errors import RecipeError, UserError
from vlmjax.models.bert import INIT, BertConfig
from vlmjax.models.layers import Ids
from vlmjax.models.med import Med, first_token
from vlmjax.models.outputs import BlipFeatures
from vlmjax.models.vit import Vit, VitConfig, check_pixels
from vlmjax.ops.norms import l2_normalize
from vlmjax.sharding.activations import constrain

Pixels = Float[Array | np.ndarray, "batch height width channels"]
ImageStates = Float[Array, "images states image_width"]
# Where the temperature starts, and between what training holds it (salesforce/BLIP, models/blip_pretrain.py).
TEMPERATURE, TEMPERATURES = 0.07, (0.001, 0.5)
MODES = ("image", "text", "multimodal")


@dataclasses.dataclass(frozen=True)
class BlipConfig:
    """An image tower, a text transformer, and what joins them.

    Attributes:
      image: a tower whose states are all normalised: class token, pool "none".
      text: without token types.
      projection_dim: of the space in which images and texts are compared.
      bos_token_id: [DEC], with which a text that is to be written begins.
      enc_token_id: [ENC], with which a text that is read with an image begins; None leaves its first token, as
        transformers does.
      sep_token_id: [SEP], which ends a text.
      label_smoothing: of the language loss, 0.1 in the paper. The model does not use it; its folder says it.
    """

    image: VitConfig
    text: BertConfig
    projection_dim: int = 256
    bos_token_id: int = 30522
    enc_token_id: int | None = 30523
    sep_token_id: int = 102
    label_smoothing: float = 0.1

    def __post_init__(self):
        """Refuse what cannot be built."""
        image = self.image
        if not image.class_token or image.pre_norm or not image.patch_bias or image.pool != "none":
            raise RecipeError(
                "BlipConfig.image is no tower of BLIP: it has class_token, patch_bias, no pre_norm and pool='none' "
                "(`blip_vit` gives them)"
            )
        if self.text.type_vocab_size is not None:
            raise RecipeError(
                f"BlipConfig.text has {self.text.type_vocab_size} token types, BLIP has none: type_vocab_size=None"
            )
        if self.projection_dim < 1:
            raise RecipeError(f"BlipConfig.projection_dim is {self.projection_dim}; give a positive number")
        for field in ("bos_token_id", "enc_token_id", "sep_token_id"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < self.text.vocab_size:
                raise RecipeError(f"BlipConfig.{field} is {value}; the vocabulary has {self.text.vocab_size}")


def blip_vit(size: str = "base", image_size: int = 224, **changes: Any) -> VitConfig:
    """BLIP's image tower: `base` is ViT-B/16, `large` ViT-L/16, which BLIP trains with a stochastic depth of 0.1."""
    if size not in ("base", "large"):
        raise RecipeError(f"BLIP's image tower of size {size!r} is not known; choose base or large")
    sizes = (768, 12, 12, 3072) if size == "base" else (1024, 24, 16, 4096)
    form = {"activation": "gelu", "layer_norm_eps": 1e-6, "class_token": True, "pre_norm": False}
    form |= {"patch_bias": True, "pool": "none", "init": "normal", "drop_path": 0.1 * (size == "large")}
    return VitConfig(*sizes, image_size=image_size, patch_size=16, **(form | changes))


def blip_config(size: str = "base", image_size: int = 224, **changes: Any) -> BlipConfig:
    """BLIP with ViT-B/16 or ViT-L/16 and a text transformer of BERT-base's shape; `changes` are BlipConfig's fields."""
    text = BertConfig(768, 12, 12, 3072, vocab_size=30524, type_vocab_size=None)
    return BlipConfig(**({"image": blip_vit(size, image_size), "text": text} | changes))


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


def open_prompt(inputs: Mapping[str, Any], config: BlipConfig) -> dict[str, np.ndarray]:
    """input_ids and attention_mask of texts that begin with [DEC] and are not closed by [SEP], which is masked."""
    ids = inputs.get("input_ids")
    if ids is None:
        ids = np.full((len(inputs["pixel_values"]), 1), config.bos_token_id, np.int32)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    ids = np.array(ids, np.int32)  # a copy: the caller's own stays as it is
    mask = np.array(inputs.get("attention_mask", np.ones_like(ids)), np.int32)
    if mask.shape != ids.shape or ids.ndim != 2:
        return {
            "input_ids": ids,
            "attention_mask": mask,
        }  # refused, with all shapes, where prompts are checked
    rows, real = np.arange(len(ids)), mask != 0
    last = ids.shape[1] - 1 - np.argmax(real[:, ::-1], axis=1)
    closed = (ids[rows, last] == config.sep_token_id) & (real.sum(axis=1) > 1)
    mask[rows[closed], last[closed]] = 0
    ids[rows, np.argmax(real, axis=1)] = config.bos_token_id
    return {"input_ids": ids, "attention_mask": mask}


def check_images(inputs: Mapping[str, Any], config: BlipConfig) -> None:
    """Raise UserError, on the host, unless there is one image for each text."""
    pixels, ids = inputs.get("pixel_values"), inputs.get("input_ids")
    if pixels is None:
        raise UserError("pixel_values is missing; give one normalised image for each text")
    check_pixels(pixels, config.image.patch_size)
    if ids is not None and len(ids) != len(pixels):
        raise UserError(f"{len(ids)} texts and {len(pixels)} images; give one image for each text")


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


def blank(config: BlipConfig) -> tuple[np.ndarray, np.ndarray]:
    """A blank image and a text of one token."""
    return np.zeros((1, *config.image.image_shape, 3), np.float32), np.zeros((1, 1), np.int32)
