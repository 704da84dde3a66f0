"""BLIP's pretraining: one pass through the image tower and three through the text transformer for each pair."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from vlmjax.errors import RecipeError
from vlmjax.losses.matching import draw_negatives, match_loss
from vlmjax.losses.smoothed import smoothed_cross_entropy
from vlmjax.models import flops
from vlmjax.models.blip import clamp_temperature
from vlmjax.models.blip_start import momentum_part
from vlmjax.ops.pixels import normalized
from vlmjax.sharding.mesh import batch_shards
from vlmjax.stages.contrastive import Contrastive
from vlmjax.stages.stage import Batch, Extra, Params


class BlipPretraining(Contrastive):
    """Contrast (ITC), matching (ITM) and writing (LM), summed (Li et al. 2022, 2201.12086, section 3.2).

    ITC is `Contrastive`'s softmax with a momentum encoder, a queue and soft targets, at a temperature that is held
    within bounds; the queue counts once it is filled. ITM looks at each pair, at its image with another text and at its
    text with another image, drawn where ITC finds them alike.
    """

    splits = False  # ITM's negatives are drawn from the whole batch

    def __init__(self, recipe: Any, model: nn.Module, mesh: Mesh):
        """`recipe` is the whole validated recipe; `model` a models/blip.py Blip."""
        super().__init__(recipe, model, mesh)
        self.frozen = ()
        self.length = recipe.model.text.max_length  # there may be more positions
        self.blocks = 1 if recipe.loss.itm_negatives == "global" else batch_shards(mesh)
        if recipe.batch_size < 2 * self.blocks:
            raise RecipeError(
                f"config.batch_size={recipe.batch_size} leaves one row for each of {self.blocks} devices: there is no "
                "other to draw ITM's negatives from; raise it, or set config.loss.itm_negatives='global'"
            )
        if recipe.micro_batches > 1:
            raise RecipeError(
                f"config.micro_batches={recipe.micro_batches}: ITM's negatives are drawn from the whole batch; leave "
                "it 1, and set config.model.remat='full' where memory is short"
            )

    def describe(self) -> str:
        """One line for the start of a run."""
        loss = self.loss_config
        weights = ", ".join(f"{name.upper()} x {loss[name]:g}" for name in ("itc", "itm", "lm"))
        negatives = f"{loss['itm_negatives']}, hardness {loss['itm_hardness']:g}"
        return f"{weights}; ITC: {super().describe()}; negatives {negatives}"

    def train_flops(self, batch: Mapping[str, Any], trained: Params) -> int:
        """Model FLOPs of a step: see models/flops.py."""
        counted = {name: bool(self.loss_config[name]) for name in ("itm", "lm", "momentum")}
        return flops.blip_train_flops(self.model.config, *batch["input_ids"].shape, **counted)

    def with_own_params(self, params: Params) -> Params:
        """The model's, whose temperature is one of them."""
        return params

    def project(self, params: Params) -> Params:
        """The temperature put back within its bounds after an update."""
        return clamp_temperature(params) if "temp" in params else params

    def averaged(self, trainable: Params) -> Params:
        """Tower, text encoder and projections; not what looks at images, and no head."""
        return momentum_part(trainable)

    def scale(self, params: Params) -> Float[Array, ""]:
        """One over the temperature."""
        return 1.0 / params["temp"]

    def encode(self, params: Params, batch: Batch, rng: PRNGKeyArray) -> dict[str, Float[Array, "batch ..."]]:
        """States of images, and both features in the common space; `pixel_values` are uint8."""
        states, embeds = self._seen(params, batch, True, rng)
        return {"image_states": states, **embeds}

    def keys(self, momentum: Params, batch: Batch) -> dict[str, Float[Array, "batch width"]]:
        """Features by the momentum encoder, which drops nothing."""
        _, embeds = jax.lax.stop_gradient(self._seen(momentum, batch, False, None))
        return {"image_keys": embeds["image_embeds"], "text_keys": embeds["text_embeds"]}

    def _seen(self, params: Params, batch: Batch, train: bool, rng: Any) -> tuple[Array, dict[str, Array]]:
        def forward(module: nn.Module) -> tuple[Array, dict[str, Array]]:
            states = module.encode_image(normalized(batch["pixel_values"], self.mean, self.std), train)
            texts = module.encode_text(batch["input_ids"], batch["attention_mask"], train)
            return states, {
                "image_embeds": module.embed_image(states),
                "text_embeds": module.embed_text(texts),
            }

        rngs = {} if rng is None else {"dropout": rng}
        return nn.apply(forward, self.model)({"params": params}, rngs=rngs)

    def head(
        self,
        params: Params,
        features: Mapping[str, Array],
        batch: Batch,
        extra: Extra,
        rng: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The weighted sum of the three losses, and each of them; what has no weight is not computed but for ITC."""
        rng = jax.random.key(0) if rng is None else rng
        drawing, matching, writing = jax.random.split(rng, 3)
        itc, metrics = super().head(params, features, batch, extra)
        metrics.pop("logit_scale")
        weights = self.loss_config
        total = weights["itc"] * itc
        metrics |= {"itc_loss": itc, "temperature": params["temp"]}
        if weights["itm"]:
            itm, matched = self._matching(params, features, batch, drawing, matching)
            total, metrics = total + weights["itm"] * itm, {**metrics, "itm_loss": itm, **matched}
        if weights["lm"]:
            lm = self._writing(params, features["image_states"], batch, writing)
            total, metrics = total + weights["lm"] * lm, {**metrics, "lm_loss": lm}
        if self.loss_config["soft_targets"]:
            metrics["soft_targets"] = self.soft_share(extra)
        return total, metrics

    def _matching(
        self, params: Params, features: Mapping[str, Array], batch: Batch, drawing: Any, rng: Any
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """ITM over three pairs for each row."""
        negatives = draw_negatives(
            drawing,
            features["image_embeds"],
            features["text_embeds"],
            features.get("image_keys", features["image_embeds"]),
            features.get("text_keys", features["text_embeds"]),
            self.loss_config["itm_hardness"] * jax.lax.stop_gradient(self.scale(params)),
            [batch[name] for name in ("caption_id", "image_id") if name in batch],
            batch["valid"],
            self.blocks,
        )
        states, ids, mask = features["image_states"], batch["input_ids"], batch["attention_mask"]
        states = _three(states, negatives.take(states, negatives.image), states)
        ids = _three(ids, ids, negatives.take(ids, negatives.text))
        mask = _three(mask, mask, negatives.take(mask, negatives.text))
        logits = self.model.apply(
            {"params": params}, states, ids, mask, True, method="match", rngs={"dropout": rng}
        )
        there = jnp.stack([batch["valid"], negatives.has_image, negatives.has_text], axis=1)
        return match_loss(logits.reshape(-1, 3, 2), there)

    def _writing(
        self, params: Params, states: Float[Array, "batch states width"], batch: Batch, rng: Any
    ) -> Float[Array, ""]:
        """LM of each text about its image."""
        ids, there = batch["input_ids"], (batch["attention_mask"] > 0) & batch["valid"][:, None]
        learned = (jnp.arange(ids.shape[1]) >= max(1, self.loss_config["prompt_tokens"]))[None] & there

        def forward(module: nn.Module) -> Float[Array, "batch tokens vocab"]:
            return module.logits(module.decode_text(states, ids, batch["attention_mask"], True)[:, :-1])

        logits = nn.apply(forward, self.model)({"params": params}, rngs={"dropout": rng})
        return smoothed_cross_entropy(logits, ids[:, 1:], learned[:, 1:], self.loss_config["lm_smoothing"])


def _three(*parts: Array) -> Array:
    """Three arrays [batch, ...] as one [3 * batch, ...] in which the three of a row are neighbours, on its device."""
    together = jnp.stack(parts, axis=1)
    return together.reshape(-1, *together.shape[2:])
