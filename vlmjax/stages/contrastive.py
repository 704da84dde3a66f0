"""Contrastive pretraining of two towers: CLIP, SigLIP's loss, MoCo; LiT when the recipe freezes one of them."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from vlmjax.errors import RecipeError
from vlmjax.losses.choice import Choice, choose
from vlmjax.losses.contrastive import Memory, Teacher, info_nce, make_terms
from vlmjax.losses.sigmoid import sigmoid
from vlmjax.models import flops
from vlmjax.ops.pixels import normalized
from vlmjax.sharding.mesh import batch_shards
from vlmjax.stages.stage import Batch, Extra, Params, Shapes, Stage


class Contrastive(Stage):
    """What a contrastive step computes: features of both towers, a loss over all pairs of the global batch.

    With a softmax (CLIP, section 2.3) or a sigmoid for each pair (SigLIP, 2303.15343). With `loss.momentum` a slowly
    moving average of the towers gives the keys, and `loss.queue` keeps those of earlier batches (MoCo, 1911.05722);
    `loss.soft_targets` is the share of the target that the average's own similarities make (ALBEF, 2107.07651).
    """

    def __init__(self, recipe: Any, model: nn.Module, mesh: Mesh):
        """`recipe` is the whole validated recipe; `model` a dual encoder (models/clip.py)."""
        self.model, self.mesh = model, mesh
        self.loss_config = recipe.loss.to_dict()
        # A fixed temperature is a frozen parameter: neither gradient nor weight decay moves it.
        self.frozen = ("logit_scale",) if recipe.loss.logit_scale == "fixed" else ()
        self.mean, self.std = tuple(recipe.data.mean), tuple(recipe.data.std)
        self.batch_size, self.seed = recipe.batch_size, recipe.seed
        self.length = model.config.text.max_length
        self.choice, self.feature_dtype = self._choose()
        queue = recipe.loss.queue
        if queue and (queue % recipe.batch_size or batch_shards(mesh) > recipe.batch_size):
            near = max(1, round(queue / recipe.batch_size)) * recipe.batch_size
            raise RecipeError(
                f"config.loss.queue={queue} does not hold whole batches of batch_size={recipe.batch_size}: "
                f"give a multiple of it, such as {near}"
            )

    def _choose(self) -> tuple[Choice, str]:
        """How the loss is computed and from what: bfloat16 features where their number makes it worth its rounding."""
        loss, cfg = self.loss_config, self.model.config
        several, taught = loss["positives"] != "pairs", bool(loss["soft_targets"])
        terms = None if loss["kind"] == "sigmoid" else make_terms(loss["hard_negatives"], several, taught)
        slots = loss["queue"] // self.batch_size if loss["momentum"] else None

        def choice(form: str, dtype: str) -> Choice:
            size = (self.batch_size, cfg.projection_dim)
            return choose(form, *size, self.mesh, dtype=dtype, terms=terms, slots=slots)

        if loss["feature_dtype"] != "auto":
            return choice(loss["form"], loss["feature_dtype"]), loss["feature_dtype"]
        if cfg.image.dtype == "bfloat16":
            half = choice(loss["form"], "bfloat16")
            if half.route.cycle:
                return half, "bfloat16"
            return choice(half.form, "float32"), "float32"
        return choice(loss["form"], "float32"), "float32"

    def describe(self) -> str:
        """One line for the start of a run: the loss, and what computing it takes."""
        return f"{self.loss_config['kind']} from {self.feature_dtype} features, {self.choice.describe()}"

    def batch_shapes(self) -> Shapes:
        """Arrays of data/examples.py."""
        tokens = (self.length,)
        return {
            "pixel_values": ((*self.model.config.image.image_shape, 3), jnp.uint8),
            "input_ids": (tokens, jnp.int32),
            "attention_mask": (tokens, jnp.int32),
            "caption_id": ((), jnp.uint32),
            "valid": ((), jnp.bool_),
            **({"image_id": ((), jnp.uint32)} if self.loss_config["positives"] == "images" else {}),
        }

    def positive_ids(self, batch: Batch) -> Array | None:
        """What is equal in rows that are positives of each other; None where no other row is one."""
        name = {"captions": "caption_id", "images": "image_id"}.get(self.loss_config["positives"])
        return batch[name] if name else None

    def train_flops(self, batch: Mapping[str, Any], trained: Params) -> int:
        """Model FLOPs of a step: see models/flops.py."""
        towers = {"image": "vision_model", "text": "text_model"}
        locked = [tower for tower, group in towers.items() if group not in trained]
        return flops.train_flops(self.model.config, batch["valid"].shape[0], locked=locked)

    def with_own_params(self, params: Params) -> Params:
        """The model's parameters and, for the sigmoid, the bias of its logits: an imported one, or as it starts."""
        if self.loss_config["kind"] != "sigmoid":
            return {name: value for name, value in params.items() if name != "logit_bias"}
        return {"logit_bias": jnp.float32(self.loss_config["logit_bias_init"]), **params}

    def encode(
        self, params: Params, batch: Batch, rng: PRNGKeyArray
    ) -> dict[str, Float[Array, "batch width"]]:
        """L2-normalised fp32 features of a batch whose `pixel_values` are uint8 [batch, height, width, 3]."""
        return self._features(params, batch, train=True, rngs={"dropout": rng})

    def _features(self, params: Params, batch: Batch, **options: Any) -> dict[str, Array]:
        image = self.model.apply(
            {"params": params},
            normalized(batch["pixel_values"], self.mean, self.std),
            method="encode_image",
            **options,
        )
        text = self.model.apply(
            {"params": params},
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            method="encode_text",
            **options,
        )
        return {"image_embeds": image, "text_embeds": text}

    def keys(self, momentum: Params, batch: Batch) -> dict[str, Float[Array, "batch width"]]:
        """The same by the momentum encoder, which sees whole images and drops nothing."""
        features = jax.lax.stop_gradient(self._features(momentum, batch))
        return {"image_keys": features["image_embeds"], "text_keys": features["text_embeds"]}

    def head(
        self,
        params: Params,
        features: Mapping[str, Array],
        batch: Batch,
        extra: Extra,
        rng: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss of the features of a whole global batch, and what to log beside it."""
        scale = self.scale(params)
        options = {
            "mesh": self.mesh,
            "valid": batch["valid"],
            "positive_ids": self.positive_ids(batch),
            "form": self.choice.form,
            "feature_dtype": self.feature_dtype,
        }
        pair = (features["image_embeds"], features["text_embeds"])
        if self.loss_config["kind"] == "sigmoid":
            loss, metrics = sigmoid(*pair, scale, params["logit_bias"], **options)
            return loss, {**metrics, "logit_scale": scale, "logit_bias": params["logit_bias"]}
        loss, metrics = info_nce(
            *pair,
            scale,
            label_smoothing=self.loss_config["label_smoothing"],
            hard_negatives=self.loss_config["hard_negatives"],
            memory=self._memory(features, extra),
            teacher=self._teacher(features, scale, extra),
            **options,
        )
        return loss, {**metrics, "logit_scale": scale}

    def scale(self, params: Params) -> Float[Array, ""]:
        """What multiplies cosines: one over the temperature."""
        return jnp.exp(params["logit_scale"])

    def _teacher(self, features: Mapping[str, Array], scale: Array, extra: Extra) -> Teacher | None:
        if not self.loss_config["soft_targets"]:
            return None
        temperature = jax.lax.stop_gradient(1.0 / scale)
        return Teacher(features["image_keys"], features["text_keys"], temperature, self.soft_share(extra))

    def soft_share(self, extra: Extra) -> Float[Array, ""]:
        """The share of soft targets at this step: it grows from 0 over the first `loss.soft_targets_ramp` steps."""
        share, ramp = self.loss_config["soft_targets"], self.loss_config["soft_targets_ramp"]
        if not ramp:
            return jnp.float32(share)
        return jnp.float32(share) * jnp.minimum(1.0, extra["steps"].astype(jnp.float32) / ramp)

    def _memory(self, features: Mapping[str, Array], extra: Extra) -> Memory | None:
        if not self.loss_config["momentum"]:
            return None
        return Memory(features["image_keys"], features["text_keys"], **extra.get("rows", self._empty_queue()))

    def _empty_queue(self) -> dict[str, Array]:
        """A queue in which nothing counts yet: for each row of the batch, some earlier examples.

        So an example's features stay on the device that held its row.
        """
        shape = (self.batch_size, self.loss_config["queue"] // self.batch_size)
        empty = jnp.zeros((*shape, self.model.config.projection_dim), jnp.float32)
        return {
            "image_queue": empty,
            "text_queue": empty,
            "queue_valid": jnp.zeros(shape, bool),
            "queue_ids": jnp.zeros(shape, jnp.uint32),
        }

    def init_extra(self, trainable: Params) -> Extra:
        """With momentum, a copy of the parameters as its encoder, and the queue if there is one."""
        if not self.loss_config["momentum"]:
            return {}
        extra = {"momentum": jax.tree.map(jnp.copy, self.averaged(trainable))}
        if self.loss_config["soft_targets_ramp"]:
            extra["steps"] = jnp.zeros((), jnp.int32)
        if self.loss_config["queue"]:
            extra |= {"rows": self._empty_queue(), "slot": jnp.zeros((), jnp.int32)}
        return extra

    def averaged(self, trainable: Params) -> Params:
        """The parameters of which the momentum encoder is an average."""
        return trainable

    def carry_on(self, extra: Extra, trainable: Params, features: Mapping[str, Array], batch: Batch) -> Extra:
        """The momentum encoder a little nearer to the parameters, the batch's keys in place of the oldest ones."""
        if not extra:
            return extra
        share = 1.0 - self.loss_config["momentum"]
        momentum = optax.incremental_update(self.averaged(trainable), extra["momentum"], share)
        carried = {"momentum": momentum} | {n: extra[n] + np.int32(1) for n in ("steps",) if n in extra}
        if "rows" not in extra:
            return carried
        new = {
            "image_queue": features["image_keys"],
            "text_queue": features["text_keys"],
            "queue_valid": batch["valid"],
            "queue_ids": batch["caption_id"] if (ids := self.positive_ids(batch)) is None else ids,
        }
        put = jax.lax.dynamic_update_index_in_dim
        rows = {name: put(old, new[name], extra["slot"], 1) for name, old in extra["rows"].items()}
        slot = (extra["slot"] + 1) % np.int32(rows["queue_valid"].shape[1])
        return {**carried, "rows": rows, "slot": slot}

    def project(self, params: Params) -> Params:
        """Parameters put back where they are allowed to be after an update: the temperature under its cap.

        Clipping the parameter and not its use keeps the gradient alive at the cap, as in CLIP's training.
        """
        if self.loss_config["logit_scale"] != "capped" or "logit_scale" not in params:
            return params
        cap = jnp.asarray(math.log(self.loss_config["logit_scale_max"]), params["logit_scale"].dtype)
        return {**params, "logit_scale": jnp.minimum(params["logit_scale"], cap)}
