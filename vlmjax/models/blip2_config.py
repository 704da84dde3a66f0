"""The shape of a BLIP-2 in its first stage (2301.12597), and the two of the paper by name."""

import dataclasses
from typing import Any

from vlmjax.errors import RecipeError
from vlmjax.models.bert import BertConfig
from vlmjax.models.qformer import QformerConfig
from vlmjax.models.vit import VitConfig

# Where the temperature starts; nothing bounds it (salesforce/LAVIS, models/blip2_models/blip2_qformer.py).
TEMPERATURE = 0.07

# Towers without their last block or the norm after it: the last but one gave better results (section 3.4).
_TOWERS: dict[str, dict[str, Any]] = {
    # EVA's ViT-g/14 (2211.07636). Its keys have no bias; ours begins and stays at zero, which a softmax does not see.
    "eva-g": {
        "width": 1408, "depth": 39, "heads": 16, "mlp_dim": 6144, "patch_size": 14, "activation": "gelu",
        "layer_norm_eps": 1e-6, "pre_norm": False, "patch_bias": True, "init": "normal",
    },
    # CLIP's ViT-L/14.
    "clip-l": {"width": 1024, "depth": 23, "heads": 16, "mlp_dim": 4096, "patch_size": 14},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Blip2Config:
    """An image tower, a norm, a Q-Former, and what joins images and texts.

    Attributes:
      image: a tower whose states are not normalised: pool "none", no post_norm (`blip2_vit` gives one).
      qformer: one that reads texts.
      projection_dim: of the space in which images and texts are compared.
      ln_vision_eps: of the norm between tower and Q-Former: 1e-5 in LAVIS, where its weights were trained, and that of
        the tower, 1e-6, in transformers.
      bos_token_id: [DEC], with which a text that is to be written begins.
    """

    image: VitConfig
    qformer: QformerConfig = QformerConfig()
    projection_dim: int = 256
    ln_vision_eps: float = 1e-5
    bos_token_id: int = 30522

    def __post_init__(self):
        """Refuse what cannot be built."""
        if self.image.pool != "none" or self.image.post_norm:
            raise RecipeError(
                "Blip2Config.image is no tower of BLIP-2: it has pool='none' and no post_norm (`blip2_vit` gives them)"
            )
        if not self.qformer.reads_text:
            raise RecipeError(
                "Blip2Config.qformer has reads_text=False; the first stage of BLIP-2 reads and writes texts"
            )
        if self.projection_dim < 1:
            raise RecipeError(f"Blip2Config.projection_dim is {self.projection_dim}; give a positive number")
        vocabulary = self.qformer.bert.vocab_size
        if not 0 <= self.bos_token_id < vocabulary:
            raise RecipeError(
                f"Blip2Config.bos_token_id is {self.bos_token_id}; the vocabulary has {vocabulary}"
            )

    @property
    def text(self) -> BertConfig:
        """What reads and writes texts."""
        return self.qformer.bert


def blip2_vit(name: str = "eva-g", image_size: int | tuple[int, int] = 224, **changes: Any) -> VitConfig:
    """BLIP-2's image tower: `eva-g` is EVA's ViT-g/14, `clip-l` CLIP's ViT-L/14, both without their last block."""
    if name not in _TOWERS:
        raise RecipeError(f"BLIP-2's image tower {name!r} is not known; choose one of {', '.join(_TOWERS)}")
    form = {"image_size": image_size, "pool": "none", "post_norm": False}
    return VitConfig(**(form | _TOWERS[name] | changes))
