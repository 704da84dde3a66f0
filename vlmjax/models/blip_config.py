"""The shape of a BLIP (2201.12086), and the two of the paper by name."""

import dataclasses
from typing import Any

from vlmjax.errors import RecipeError
from vlmjax.models.bert import BertConfig
from vlmjax.models.vit import VitConfig

# Where the temperature starts, and between what training holds it (salesforce/BLIP, models/blip_pretrain.py).
TEMPERATURE, TEMPERATURES = 0.07, (0.001, 0.5)


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
