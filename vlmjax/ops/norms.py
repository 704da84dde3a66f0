"""Normalisation, always computed in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def layer_norm(
    x: Float[Array, "*batch width"],
    scale: Float[Array, " width"],
    bias: Float[Array, " width"],
    eps: float,
) -> Float[Array, "*batch width"]:
    """Centre and scale the last axis (Ba et al. 2016) in float32; the result is float32.

    The variance is the mean of squared deviations: E[x^2] - E[x]^2 is one pass, but loses all digits where
    the mean is large beside the spread, as it is in some channels of a trained transformer.
    """
    shape = (1,) * (x.ndim - 1) + scale.shape
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps) * scale.reshape(shape) + bias.reshape(shape)


def rms_norm(
    x: Float[Array, "*batch width"], scale: Float[Array, " width"], eps: float
) -> Float[Array, "*batch width"]:
    """Divide the last axis by its root mean square (arXiv:1910.07467); the result has the dtype of `x`.

    The division is float32 and its result is rounded to the dtype of `x` before it is scaled, in that order, as in
    the models whose weights are read (transformers, LlamaRMSNorm).
    """
    wide = x.astype(jnp.float32)
    square = jnp.square(wide).mean(axis=-1, keepdims=True)
    unit = (wide * jax.lax.rsqrt(square + eps)).astype(x.dtype)
    return unit * scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + scale.shape)


def l2_normalize(x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """Divide by the Euclidean length of the last axis, in float32. A vector of zeros stays zeros."""
    x = x.astype(jnp.float32)
    squared = jnp.square(x).sum(axis=-1, keepdims=True)
    # Far below any real embedding; it keeps 0/0 away from empty rows, and 1e-24**-1.5 is still a float32.
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))
