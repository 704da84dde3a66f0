"""Generative training: the next tokens of answers, for every model that ends in a language model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from vlmjax.losses.token_cross_entropy import token_cross_entropy
from vlmjax.models import flops
from vlmjax.models.layers import DTYPES
from vlmjax.models.lora import LoraConfig, applied, placement, sizes, variables, with_adapters
from vlmjax.ops.flash import choose_attention
from vlmjax.ops.pixels import normalized
from vlmjax.stages.stage import Batch, Extra, Params, Rules, Shapes, Stage, check_micro_batches


class Generative(Stage):
    """Cross-entropy of the tokens that have a weight, divided by the weight of the whole global batch.

    So a long answer counts as much as its tokens, in whatever micro-batch and on whatever device it lies (LLaVA,
    2304.08485, section 4.2: loss on the answers and where they stop).
    """

    decomposes = True
    unit = "rows"

    def __init__(self, recipe: Any, model: nn.Module, mesh: Mesh):
        """`recipe` is the whole validated recipe; `model` a models/vlm.py Vlm."""
        self.mesh = mesh
        self.mean, self.std = tuple(recipe.data.mean), tuple(recipe.data.std)
        self.z_loss, self.seed = recipe.loss.z_loss, recipe.seed
        self.lora = LoraConfig(**recipe.lora.to_dict())
        # What has an adapter is what the adapter changes: the kernel itself stays.
        self.frozen = self.lora.targets if self.lora.rank else ()
        self.length, self.slots = recipe.data.max_length, recipe.data.images_per_row
        self.frozen_dtype = model.config.text.dtype
        self.lengths = tuple(recipe.data.lengths) or (self.length,)
        self.model = _with_attention(model, recipe.model.attention, mesh, self.lengths)
        check_micro_batches(recipe, mesh)

    def describe(self) -> str:
        """One line for the start of a run."""
        more = f", z-loss {self.z_loss:g}" if self.z_loss else ""
        rank = f"; adapters of rank {self.lora.rank}" if self.lora.rank else ""
        of = " or ".join(map(str, self.lengths))
        rows = f"rows of {of} tokens, {self.slots} image(s)"
        attention = f"attention by {self.model.config.text.attention}"
        return f"cross-entropy of next tokens, in chunks{more}; {rows}; {attention}{rank}"

    def with_own_params(self, params: Params) -> Params:
        """The model's parameters and those of low-rank adapters, where the recipe has some: see models/lora.py."""
        if not self.lora.rank:
            return params
        return with_adapters(params, self.lora, jax.random.key(self.seed))

    def placement(self, rules: Rules, params: Params) -> Rules:
        """Adapters lie as their kernels do."""
        return placement(rules, params)

    def batch_shapes(self) -> Shapes:
        """Arrays of data/generative.py, where rows are grouped those of the largest batch."""
        tokens, image = (self.length,), self.model.config.image.image_shape
        return {
            "input_ids": (tokens, jnp.int32),
            "targets": (tokens, jnp.int32),
            "target_weights": (tokens, jnp.float32),
            "position_ids": (tokens, jnp.int32),
            "segment_ids": (tokens, jnp.int32),
            "image_index": (tokens, jnp.int32),
            "pixel_values": ((self.slots, *image, 3), jnp.uint8),
            "image_valid": ((self.slots,), jnp.bool_),
            "valid": ((), jnp.bool_),
        }

    def train_flops(self, batch: Mapping[str, Any], trained: Params) -> int:
        """Model FLOPs of a step: see models/flops.py."""
        return flops.vlm_train_flops(
            self.model.config,
            batch["valid"].shape[0],
            length=batch["input_ids"].shape[1],
            slots=batch["pixel_values"].shape[1],
            trained=tuple(trained),
            adapted=sizes(trained.get("lora", {})),
        )

    def encode(
        self, params: Params, batch: Batch, rng: PRNGKeyArray
    ) -> dict[str, Float[Array, "batch tokens width"]]:
        """Hidden states of rows whose `pixel_values` are uint8 [batch, slots, height, width, 3]."""

        def forward(module: nn.Module) -> Array:
            pixels = normalized(batch["pixel_values"], self.mean, self.std)
            embeddings = module.embed(batch["input_ids"], pixels, image_index=batch["image_index"])
            hidden, _ = module(embeddings, positions=batch["position_ids"], segment_ids=batch["segment_ids"])
            return hidden

        with applied(self.lora, train=True):
            return {"hidden": nn.apply(forward, self.model)(variables(params), rngs={"dropout": rng})}

    def head(
        self,
        params: Params,
        features: Mapping[str, Array],
        batch: Batch,
        extra: Extra,
        rng: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss, and beside it how many of the tokens would have been chosen."""
        hidden = features["hidden"]
        kernel = nn.apply(lambda module: module.head_kernel(), self.model)(variables(params))
        weights = batch["target_weights"].reshape(-1)
        sums = token_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            kernel,
            batch["targets"].reshape(-1),
            weights,
            z_loss=self.z_loss,
        )
        total = jnp.maximum(batch.get("total_weight", sums.weight), 1e-9)
        return sums.loss / total, {"token_accuracy": sums.right / total}

    def total_weight(self, batch: Batch) -> Float[Array, ""]:
        """What the losses of all parts of a batch are divided by."""
        return batch["target_weights"].sum()


def _with_attention(model: nn.Module, name: str, mesh: Mesh, lengths: Sequence[int]) -> nn.Module:
    """The model whose language model attends by a kernel, the one that suits the mesh's devices unless named."""
    words = model.config.text
    if name == "auto":
        name = choose_attention(
            mesh,
            tokens=max(
                lengths, key=lambda length: (length % 2, length)
            ),  # no kernel for one, no kernel for all
            heads=words.heads,
            kv_heads=words.kv_heads,
            head_dim=words.head_dim,
            dtype=DTYPES[words.dtype],
        )
    words = dataclasses.replace(words, attention=name)
    return model.clone(config=dataclasses.replace(model.config, text=words))
