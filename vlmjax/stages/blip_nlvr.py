"""BLIP judges statements about two images: true or false (NLVR2)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from vlmjax.models import flops
from vlmjax.ops.pixels import normalized
from vlmjax.stages.stage import Batch, Extra, Params, Shapes, Stage, check_micro_batches


class BlipStatements(Stage):
    """Cross-entropy of (false, true), over the statements of the batch (Li et al. 2022, 2201.12086, section 5.4)."""

    decomposes = True
    unit = "statements"

    def __init__(self, recipe: Any, model: nn.Module, mesh: Mesh):
        """`recipe` is the whole validated recipe; `model` a models/blip_tasks.py BlipNlvr."""
        self.model, self.length = model, recipe.model.text.max_length
        self.mean, self.std = tuple(recipe.data.mean), tuple(recipe.data.std)
        check_micro_batches(recipe, mesh)

    def describe(self) -> str:
        """One line for the start of a run."""
        return "cross-entropy of a statement about two images being false or true"

    def batch_shapes(self) -> Shapes:
        """Arrays of data/statements.py."""
        return {
            "pixel_values": ((2, *self.model.config.image.image_shape, 3), jnp.uint8),
            "input_ids": ((self.length,), jnp.int32),
            "attention_mask": ((self.length,), jnp.int32),
            "label": ((), jnp.int32),
            "valid": ((), jnp.bool_),
        }

    def train_flops(self, batch: Mapping[str, Any], trained: Params) -> int:
        """Model FLOPs of a step: see models/flops.py."""
        rows, tokens = batch["input_ids"].shape
        return flops.blip_nlvr_train_flops(self.model.config, rows, tokens, trained=tuple(trained))

    def total_weight(self, batch: Batch) -> Float[Array, ""]:
        """Statements: what the losses of all parts of a batch are divided by."""
        return batch["valid"].sum(dtype=jnp.float32)

    def encode(self, params: Params, batch: Batch, rng: PRNGKeyArray) -> dict[str, Float[Array, "batch 2"]]:
        """Logits of (false, true); `pixel_values` are uint8."""
        pixels = normalized(batch["pixel_values"], self.mean, self.std)
        words = (batch["input_ids"], batch["attention_mask"])
        return {
            "logits": self.model.apply({"params": params}, pixels, *words, train=True, rngs={"dropout": rng})
        }

    def head(
        self,
        params: Params,
        features: Mapping[str, Array],
        batch: Batch,
        extra: Extra,
        rng: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss, and the share of statements that were judged right."""
        logits, label = features["logits"], batch["label"]
        valid = batch["valid"].astype(jnp.float32)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]
        total = jnp.maximum(batch.get("total_weight", valid.sum()), 1.0)
        right = (logits.argmax(axis=1) == label).astype(jnp.float32)
        return (valid * losses).sum() / total, {"accuracy": (valid * right).sum() / total}
