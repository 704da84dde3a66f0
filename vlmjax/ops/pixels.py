"""Pixels as image towers read them, made on the device, so that a quarter of the bytes travel to it."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def normalized(
    pixel_values: UInt8[Array, "*batch 3"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "*batch 3"]:
    """(x / 255 - mean) / std, in float32."""
    shape = (1,) * (pixel_values.ndim - 1) + (3,)
    mean, std = (jnp.asarray(value, jnp.float32).reshape(shape) for value in (mean, std))
    return (pixel_values.astype(jnp.float32) / jnp.float32(255) - mean) / std
