"""Contrastive pretraining of two towers: CLIP, and LiT when the recipe freezes one of them."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from vlmjax.losses.contrastive import info_nce

Params = Mapping[str, Any]
Batch = Mapping[str, Array]


class Contrastive:
    """What a contrastive step computes: features of both towers, InfoNCE over the global batch (CLIP, section 2.3).

    A stage is pure: parameters and batch in, numbers out. The two halves `encode` and `head` are apart because
    gradient caching runs the first in micro-batches and the second once (see training/step.py).
    """

    def __init__(self, recipe: Any, model: nn.Module, mesh: Mesh):
        """`recipe` is the whole validated recipe; `model` a dual encoder (models/clip.py)."""
        self.model, self.mesh = model, mesh
        self.loss_config = recipe.loss.to_dict()
        # A fixed temperature is a frozen parameter: neither gradient nor weight decay moves it.
        self.frozen = ("logit_scale",) if recipe.loss.logit_scale == "fixed" else ()
        self.mean, self.std = tuple(recipe.data.mean), tuple(recipe.data.std)

    def encode(
        self, params: Params, batch: Batch, rng: PRNGKeyArray
    ) -> dict[str, Float[Array, "batch width"]]:
        """L2-normalised fp32 features of a batch whose `pixel_values` are uint8 [batch, height, width, 3]."""
        rngs = {"dropout": rng}
        image = self.model.apply(
            {"params": params},
            self.normalize(batch["pixel_values"]),
            train=True,
            rngs=rngs,
            method="encode_image",
        )
        text = self.model.apply(
            {"params": params},
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            train=True,
            rngs=rngs,
            method="encode_text",
        )
        return {"image_embeds": image, "text_embeds": text}

    def head(
        self, params: Params, features: Mapping[str, Array], batch: Batch
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """InfoNCE of the features of a whole global batch, and what to log beside it."""
        scale = jnp.exp(params["logit_scale"])
        ids = batch["caption_id"] if self.loss_config["positives"] == "captions" else None
        loss, metrics = info_nce(
            features["image_embeds"],
            features["text_embeds"],
            scale,
            mesh=self.mesh,
            valid=batch["valid"],
            positive_ids=ids,
            label_smoothing=self.loss_config["label_smoothing"],
        )
        return loss, {**metrics, "logit_scale": scale}

    def project(self, params: Params) -> Params:
        """Parameters put back where they are allowed to be after an update: the temperature under its cap.

        Clipping the parameter and not its use keeps the gradient alive at the cap, as in CLIP's training.
        """
        if self.loss_config["logit_scale"] != "capped" or "logit_scale" not in params:
            return params
        cap = jnp.asarray(math.log(self.loss_config["logit_scale_max"]), params["logit_scale"].dtype)
        return {**params, "logit_scale": jnp.minimum(params["logit_scale"], cap)}

    def normalize(self, pixel_values: Array) -> Float[Array, "batch height width 3"]:
        """(x / 255 - mean) / std on the device, so that a quarter of the bytes travel to it."""
        mean, std = (jnp.asarray(v, jnp.float32)[None, None, None, :] for v in (self.mean, self.std))
        return (pixel_values.astype(jnp.float32) / jnp.float32(255) - mean) / std
