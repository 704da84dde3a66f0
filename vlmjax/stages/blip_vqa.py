"""BLIP answers questions about images: every answer of a question is learned, each with its weight (VQA)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from vlmjax.losses.smoothed import smoothed_cross_entropies
from vlmjax.models import flops
from vlmjax.ops.pixels import normalized
from vlmjax.stages.stage import Batch, Extra, Params, Shapes, Stage, check_micro_batches


class BlipAnswers(Stage):
    """The weighted sum of the losses of a question's answers, over the questions of the batch.

    An answer's loss is the sum over its tokens, so that a long one counts more; weights are shares of the annotators
    (Li et al. 2022, 2201.12086, section 5.3; salesforce/BLIP, models/blip_vqa.py).
    """

    decomposes = True
    unit = "questions"

    def __init__(self, recipe: Any, model: nn.Module, mesh: Mesh):
        """`recipe` is the whole validated recipe; `model` a models/blip_tasks.py BlipVqa."""
        self.model = model
        self.mean, self.std = tuple(recipe.data.mean), tuple(recipe.data.std)
        self.length, self.slots = recipe.model.text.max_length, recipe.data.answers
        self.answer_length, self.smoothing = recipe.data.answer_length, recipe.loss.lm_smoothing
        check_micro_batches(recipe, mesh)

    def describe(self) -> str:
        """One line for the start of a run."""
        return f"cross-entropy of up to {self.slots} weighted answers, smoothed by {self.smoothing:g}"

    def batch_shapes(self) -> Shapes:
        """Arrays of data/questions.py."""
        question, answers = (self.length,), (self.slots, self.answer_length)
        return {
            "pixel_values": ((*self.model.config.image.image_shape, 3), jnp.uint8),
            "input_ids": (question, jnp.int32),
            "attention_mask": (question, jnp.int32),
            "answer_ids": (answers, jnp.int32),
            "answer_mask": (answers, jnp.int32),
            "answer_weights": ((self.slots,), jnp.float32),
            "valid": ((), jnp.bool_),
        }

    def train_flops(self, batch: Mapping[str, Any], trained: Params) -> int:
        """Model FLOPs of a step: see models/flops.py."""
        _, slots, answer = batch["answer_ids"].shape
        return flops.blip_vqa_train_flops(
            self.model.config, *batch["input_ids"].shape, slots, answer, trained=tuple(trained)
        )

    def total_weight(self, batch: Batch) -> Float[Array, ""]:
        """Questions: what the losses of all parts of a batch are divided by."""
        return batch["valid"].sum(dtype=jnp.float32)

    def encode(
        self, params: Params, batch: Batch, rng: PRNGKeyArray
    ) -> dict[str, Float[Array, "batch words width"]]:
        """States of questions that have looked at their images; `pixel_values` are uint8."""

        def forward(module: nn.Module) -> Array:
            images = module.encode_image(normalized(batch["pixel_values"], self.mean, self.std), True)
            return module.encode_question(images, batch["input_ids"], batch["attention_mask"], True)

        states = nn.apply(forward, self.model)({"params": params}, rngs={"dropout": rng})
        return {"question_states": states}

    def head(
        self,
        params: Params,
        features: Mapping[str, Array],
        batch: Batch,
        extra: Extra,
        rng: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss, and beside it the share of tokens of the weightiest answers that would have been chosen."""
        rows, slots, length = batch["answer_ids"].shape
        ids, mask = (batch[name].reshape(rows * slots, length) for name in ("answer_ids", "answer_mask"))

        def forward(module: nn.Module) -> Float[Array, "answers tokens vocab"]:
            states = features["question_states"]
            hidden = module.decode_answer(states, batch["attention_mask"], ids, mask, rng is not None)
            return module.logits(hidden[:, :-1])

        rngs = {} if rng is None else {"dropout": rng}
        logits = nn.apply(forward, self.model)({"params": params}, rngs=rngs)
        labels, learned = ids[:, 1:], mask[:, 1:] > 0
        losses = smoothed_cross_entropies(logits, labels, learned, self.smoothing).sum(axis=1)
        weights = batch["answer_weights"] * batch["valid"][:, None].astype(jnp.float32)
        total = jnp.maximum(batch.get("total_weight", self.total_weight(batch)), 1.0)
        right = ((logits.argmax(-1) == labels) & learned).reshape(rows, slots, -1)[:, 0]
        tokens = jnp.maximum(learned.reshape(rows, slots, -1)[:, 0].sum(axis=1, dtype=jnp.float32), 1.0)
        share = right.sum(axis=1, dtype=jnp.float32) / tokens
        return (weights.reshape(-1) * losses).sum() / total, {"token_accuracy": share.sum() / total}
