"""The parts that towers compose into their blocks, and the scan that stacks blocks into depth."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vlmjax.errors import RecipeError, UserError
from vlmjax.ops.activations import ACTIVATIONS
from vlmjax.ops.attention import attention, merge_heads, split_heads
from vlmjax.ops.norms import layer_norm, rms_norm
from vlmjax.sharding.activations import constrain

Ids = Int[Array | np.ndarray, "batch tokens"]
# Positions may be one row for the whole batch.
PositionIds = Int[Array | np.ndarray, "_ tokens"]

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

# What a block keeps for the backward pass. none: all it needs; dots: the results of its projections, so only
# attention scores, norms and activations are computed again; full: its input alone.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class BlockInit:
    """Initialisers of a block's kernels; biases start at zero."""

    qkv: nn.initializers.Initializer
    out: nn.initializers.Initializer
    fc1: nn.initializers.Initializer
    fc2: nn.initializers.Initializer


class LayerNorm(nn.Module):
    """Layer normalisation with learned scale and bias; computed in float32, returned in `dtype`."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalise the last axis."""
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:], jnp.float32)
        return layer_norm(x, scale, bias, self.eps).astype(self.dtype)


class RmsNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale; computed in float32, returned in `dtype`."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalise the last axis."""
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:], jnp.float32)
        return rms_norm(x.astype(self.dtype), scale, self.eps)


class SelfAttention(nn.Module):
    """Multi-head self-attention with biased projections q_proj, k_proj, v_proj, out_proj."""

    heads: int
    dtype: Any
    init: BlockInit

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        mask: Bool[Array, "#batch #heads #queries tokens"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Let every token look where `mask` is True (everywhere without one)."""
        width = x.shape[-1]
        q, k, v = (
            heads_of(nn.Dense(width, dtype=self.dtype, kernel_init=self.init.qkv, name=name)(x), self.heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = merge_heads(attention(q, k, v, mask=mask))
        return nn.Dense(width, dtype=self.dtype, kernel_init=self.init.out, name="out_proj")(mixed)


class Mlp(nn.Module):
    """Two projections, fc1 and fc2, around an activation given by its Hugging Face name."""

    mlp_dim: int
    activation: str
    dtype: Any
    init: BlockInit

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Apply to every token alone."""
        hidden = nn.Dense(self.mlp_dim, dtype=self.dtype, kernel_init=self.init.fc1, name="fc1")(x)
        hidden = ACTIVATIONS[self.activation](constrain(hidden, "batch", None, "mlp"))
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=self.init.fc2, name="fc2")(hidden)


def heads_of(
    x: Float[Array, "batch tokens width"], heads: int
) -> Float[Array, "batch tokens heads head_dim"]:
    """`split_heads` of a projection, each device holding its own examples and heads."""
    return constrain(split_heads(x, heads), "batch", None, "heads", None)


def stream(x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
    """The residual stream, each device holding its own examples whole: towers begin and blocks end with it."""
    return constrain(x, "batch", None, None)


def stack(block: type[nn.Module], depth: int, remat: str, *, dealt: bool = False) -> type[nn.Module]:
    """`depth` copies of a block, scanned: parameters get a leading axis of layers and compile once.

    The block's call takes (x, other) and returns (x, what the scan collects); `other` is the same for every layer,
    or with `dealt` has a leading axis of layers. `remat` is a name of REMAT. Adapters (models/lora.py) are dealt out
    to the layers as parameters are.
    """
    if remat != "none":
        # A scan already keeps recomputation apart from the forward pass, so the barrier against common
        # subexpressions is not needed and would only cost.
        block = nn.remat(block, prevent_cse=False, policy=REMAT[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0 if dealt else nn.broadcast,),
        length=depth,
    )


def check_tower(config: Any) -> None:
    """Raise RecipeError where a tower's config cannot be built: heads, activation, dtype, remat."""
    name = type(config).__name__
    for field in ("width", "depth", "heads", "mlp_dim"):
        if getattr(config, field) < 1:
            raise RecipeError(f"{name}.{field} is {getattr(config, field)}; give a positive number")
    if config.width % config.heads:
        raise RecipeError(
            f"{name}.width {config.width} is not a multiple of heads {config.heads}; change either of them"
        )
    for field, known in (("activation", ACTIVATIONS), ("dtype", DTYPES), ("remat", REMAT)):
        if getattr(config, field) not in known:
            raise RecipeError(
                f"{name}.{field} is {getattr(config, field)!r}; choose one of {', '.join(known)}"
            )


def check_length(input_ids: Ids, max_length: int) -> None:
    """Raise UserError where there are more tokens than learned positions."""
    if input_ids.shape[1] > max_length:
        raise UserError(
            f"input_ids has {input_ids.shape[1]} tokens, the model has {max_length} positions; truncate it"
        )


def lookup(
    table: Float[Array, "rows width"], ids: Int[Array | np.ndarray, "batch tokens"]
) -> Float[Array, "batch tokens width"]:
    """Rows of an embedding table. An id outside the table gives NaN, so that it cannot pass unseen."""
    # The table travels to the ids, as any kernel does. Left to itself the compiler sends all ids to every slice of the
    # table: 256 slices of 3 columns are then padded to 128 each, and 256 times as many rows are looked up.
    table = constrain(table, None, None)
    return jnp.take(table, jnp.asarray(ids), axis=0, mode="fill", fill_value=jnp.nan)
