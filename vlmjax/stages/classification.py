"""Fine-tuning on labelled images: a tower with a linear head, everything trained or the head alone."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from vlmjax.models import flops
from vlmjax.models.classifier import Classifier
from vlmjax.ops.pixels import normalized
from vlmjax.stages.stage import Batch, Extra, Params, Shapes, Stage


class Classification(Stage):
    """Cross-entropy of the classes; `loss.label_smoothing` is the share of the target that all classes divide."""

    decomposes = True

    def __init__(self, recipe: Any, model: Classifier, mesh: Mesh):
        """`recipe` is the whole validated recipe; `model` a models/classifier.py Classifier."""
        self.model: nn.Module = model
        self.mean, self.std = tuple(recipe.data.mean), tuple(recipe.data.std)
        self.smoothing = recipe.loss.label_smoothing

    def describe(self) -> str:
        """One line for the start of a run."""
        cfg, smoothing = self.model.config, f", label smoothing {self.smoothing:g}" if self.smoothing else ""
        return f"cross-entropy of {len(cfg.names)} classes{smoothing}; the head reads {cfg.pool!r}"

    def batch_shapes(self) -> Shapes:
        """Arrays of data/labelled.py."""
        return {
            "pixel_values": ((*self.model.config.image.image_shape, 3), jnp.uint8),
            "valid": ((), jnp.bool_),
            "label": ((), jnp.int32),
        }

    def train_flops(self, batch: Mapping[str, Any], trained: Params) -> int:
        """Model FLOPs of a step: see models/flops.py."""
        return flops.classifier_train_flops(
            self.model.config, batch["valid"].shape[0], tower="vision_model" in trained
        )

    def total_weight(self, batch: Batch) -> Float[Array, ""]:
        """Images that have a class."""
        return batch["valid"].sum(dtype=jnp.float32)

    def encode(
        self, params: Params, batch: Batch, rng: PRNGKeyArray
    ) -> dict[str, Float[Array, "batch classes"]]:
        """Scores of images whose `pixel_values` are uint8 [batch, height, width, 3]."""
        pixels = normalized(batch["pixel_values"], self.mean, self.std)
        return {"scores": self.model.apply({"params": params}, pixels, train=True, rngs={"dropout": rng})}

    def head(
        self,
        params: Params,
        features: Mapping[str, Array],
        batch: Batch,
        extra: Extra,
        rng: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The mean loss of valid rows, and how many of them are right."""
        scores, labels = features["scores"], batch["label"]
        targets = optax.losses.smooth_labels(
            (labels[:, None] == jnp.arange(scores.shape[1])[None]).astype(jnp.float32), self.smoothing
        )
        losses = optax.losses.softmax_cross_entropy(scores, targets)
        total = jnp.maximum(batch.get("total_weight", self.total_weight(batch)), 1.0)
        right = (scores.argmax(axis=-1) == labels) & batch["valid"]
        loss = jnp.where(batch["valid"], losses, 0.0).sum() / total
        return loss, {"accuracy": right.sum(dtype=jnp.float32) / total}
