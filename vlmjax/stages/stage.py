"""What a training stage is: the functions that one step is made of, and what it carries from step to step."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from vlmjax.errors import RecipeError
from vlmjax.sharding.mesh import batch_shards

Params = Mapping[str, Any]
Batch = Mapping[str, Array]
Extra = Mapping[str, Any]
Rules = Sequence[tuple[str, Any]]
Shapes = Mapping[str, tuple[tuple[int, ...], Any]]  # of one row, and the dtype


class Stage:
    """A stage is pure: parameters and batch in, numbers out; training/step.py puts the parts together.

    `encode` and `head` are apart because gradient caching runs the first in micro-batches and the second once. A stage
    that needs more than parameters keeps it in `extra`, which is placed, saved and restored like them: `momentum` is an
    average of the trainable parameters whose features `keys` computes; what lies under `rows` has a row an example.
    """

    model: nn.Module
    frozen: tuple[str, ...] = ()  # regexes on paths of parameters that this stage does not train
    frozen_dtype: str = "float32"  # in which parameters that are not trained are kept
    unit: str = "images"  # what a batch has so many of, for people who watch
    # Whether the loss of a batch is the sum of those of its parts, once `total_weight` is known; then micro-batches
    # need no second forward pass. Metrics are sums over that weight as well.
    decomposes: bool = False
    splits: bool = True  # whether a batch may be gone through in micro-batches at all

    def with_own_params(self, params: Params) -> Params:
        """The model's parameters and those that the loss adds."""
        return params

    def placement(self, rules: Rules, params: Params) -> Rules:
        """The recipe's rules of placement, and those that follow from them for parameters that the stage adds."""
        return rules

    def describe(self) -> str:
        """One line for the start of a run: the loss, and what computing it takes."""
        return type(self).__name__.lower()

    def batch_shapes(self) -> Shapes:
        """Shape of a row and dtype of every array of a batch."""
        raise NotImplementedError

    def train_flops(self, batch: Mapping[str, Any], trained: Params) -> int:
        """Model FLOPs of a step on a batch, of which only `trained`, by its top-level groups, gets a gradient.

        Shapes are all that counts of `batch`.
        """
        raise NotImplementedError

    def total_weight(self, batch: Batch) -> Array:
        """What the loss of a stage that `decomposes` is divided by; its parts find it in `batch["total_weight"]`."""
        raise NotImplementedError

    def encode(self, params: Params, batch: Batch, rng: PRNGKeyArray) -> dict[str, Array]:
        """Features of a batch or micro-batch, each [rows, ...], through which gradients flow."""
        raise NotImplementedError

    def keys(self, momentum: Params, batch: Batch) -> dict[str, Array]:
        """Features of a batch by the momentum encoder, without gradient; none by default."""
        return {}

    def head(
        self,
        params: Params,
        features: Mapping[str, Array],
        batch: Batch,
        extra: Extra,
        rng: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss of a whole global batch from its features, and what to log beside it."""
        raise NotImplementedError

    def project(self, params: Params) -> Params:
        """Parameters put back where they are allowed to be after an update."""
        return params

    def init_extra(self, trainable: Params) -> Extra:
        """What the stage carries before the first step."""
        return {}

    def carry_on(self, extra: Extra, trainable: Params, features: Mapping[str, Array], batch: Batch) -> Extra:
        """What it carries after a step, given the updated parameters and the features of the step's batch."""
        return extra


def check_micro_batches(recipe: Any, mesh: Mesh) -> None:
    """Raise RecipeError where a part of the batch cannot be split over the devices."""
    rows = recipe.batch_size // recipe.micro_batches
    if rows % batch_shards(mesh):
        raise RecipeError(
            f"config.micro_batches={recipe.micro_batches} leaves {rows} rows for {batch_shards(mesh)} devices"
        )
