"""An image tower with a linear head: the class of an image."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlmjax.errors import RecipeError
from vlmjax.models.clip import projection, unit
from vlmjax.models.vit import Vit, VitConfig, class_state

Pixels = Float[Array | np.ndarray, "images height width channels"]
POOLS = ("class", "mean", "projected")


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """A tower, what the head reads of it, and the classes.

    Attributes:
      image: of any kind.
      names: of the classes, as people read them.
      labels: what data files call them; empty where the names are the records' own captions or labels.
      pool: what the head reads: `class`, the normalised class token (or what a tower of another kind pools); `mean`
        of the patches' last states, as CLIPForImageClassification; `projected`, the unit vector in the space of CLIP's
        texts, with which a head of prompts is the zero-shot classifier (WiSE-FT, 2109.01903).
      projection_dim: of that space; 0 with another pool.
    """

    image: VitConfig
    names: tuple[str, ...]
    labels: tuple[str, ...] = ()
    pool: str = "class"
    projection_dim: int = 0

    def __post_init__(self):
        """Refuse what cannot be built."""
        if self.pool not in POOLS:
            raise RecipeError(f"ClassifierConfig.pool is {self.pool!r}; choose one of {', '.join(POOLS)}")
        if len(self.names) < 2:
            raise RecipeError(
                f"ClassifierConfig.names are {self.names}; a classifier has two classes or more"
            )
        if self.labels and len(self.labels) != len(self.names):
            raise RecipeError(
                f"ClassifierConfig has {len(self.labels)} labels and {len(self.names)} names; give each class both"
            )
        if (self.projection_dim > 0) != (self.pool == "projected"):
            raise RecipeError(
                f"ClassifierConfig.projection_dim is {self.projection_dim} with pool={self.pool!r}; it is for "
                "'projected' alone, which needs it"
            )


class Classifier(nn.Module):
    """CLIPForImageClassification with `mean`, ViTForImageClassification with `class` on a tower like ViTModel's."""

    config: ClassifierConfig

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.config.names)

    def setup(self):
        """Build tower and head."""
        cfg = self.config
        self.vision_model = Vit(cfg.image)
        if cfg.pool == "projected":
            self.visual_projection = projection(cfg.image.width, cfg.projection_dim)
        init = nn.initializers.normal(0.02)  # as transformers begins its heads
        self.classifier = nn.Dense(self.classes, dtype=jnp.float32, kernel_init=init)

    def __call__(self, pixel_values: Pixels, *, train: bool = False) -> Float[Array, "images classes"]:
        """Scores of each class before the softmax, float32. With `train`, dropout draws from the "dropout" rng."""
        out = self.vision_model(pixel_values, train=train)
        if self.config.pool == "mean":
            patches = out.last_hidden_state[:, int(self.config.image.class_token) :]
            return self.classifier(patches.astype(jnp.float32).mean(axis=1))
        state = class_state(out)
        return self.classifier(
            unit(self.visual_projection(state)) if self.config.pool == "projected" else state
        )


def example_inputs(config: ClassifierConfig) -> dict[str, np.ndarray]:
    """One blank image: what `Classifier(config).init` needs to make all parameters."""
    return {"pixel_values": np.zeros((1, *config.image.image_shape, 3), np.float32)}
