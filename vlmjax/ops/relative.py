"""Relative positions (T5, arXiv:1910.10683, section 2.1): a learned score for how far a key lies from a query."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def distance_buckets(buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each distance 0 .. max_distance: int32 [max_distance + 1]; all that is farther is as the last.

    Half of the buckets are for one distance each, the others for spans that grow by a factor up to `max_distance`.
    Computed in float32 as in mesh-tensorflow (transformer_layers.py: _relative_position_bucket), by which weights
    were trained.
    """
    exact = buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    grown = exact + (ratio / np.float32(math.log(max_distance / exact)) * (buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(grown, buckets - 1)).astype(np.int32)


def relative_bias(
    table: Float[Array, "buckets heads"],
    queries: Int[Array, "_ queries"],
    keys: Int[Array, "_ keys"],
    *,
    causal: bool,
    max_distance: int,
) -> Float[Array, "_ heads queries keys"]:
    """What to add to the scores of queries and keys at these positions, in float32.

    With `causal` all buckets are for keys before a query; otherwise half of them are for those after it.
    """
    count = table.shape[0] if causal else table.shape[0] // 2
    relative = keys[:, None, :] - queries[:, :, None]
    distance = jnp.maximum(-relative, 0) if causal else jnp.abs(relative)
    bucket = jnp.asarray(distance_buckets(count, max_distance))[jnp.minimum(distance, max_distance)]
    if not causal:
        bucket = bucket + jnp.where(relative > 0, count, 0)
    # A product with ones and zeros: accelerators look nothing up as fast as they multiply.
    chosen = jax.nn.one_hot(bucket, table.shape[0], dtype=jnp.float32)
    return jnp.einsum("bqkn,nh->bhqk", chosen, table.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
