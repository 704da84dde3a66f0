"""Relative positions: buckets by hand, and the scores of every pair one by one."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from vlmjax.ops.relative import distance_buckets, relative_bias


def bucket_of(distance, buckets, farthest):
    """Half of the buckets for a distance each, then spans that grow by a factor."""
    exact = buckets // 2
    if distance < exact:
        return distance
    grown = math.log(distance / exact) / math.log(farthest / exact) * (buckets - exact)
    return min(buckets - 1, exact + int(grown + 1e-6))


@pytest.mark.parametrize(("buckets", "farthest"), [(16, 128), (32, 128), (4, 9), (2, 5)])
def test_buckets(buckets, farthest):
    wanted = [bucket_of(distance, buckets, farthest) for distance in range(farthest + 1)]
    np.testing.assert_array_equal(distance_buckets(buckets, farthest), wanted)
    assert wanted[-1] == buckets - 1


def test_t5s_own_buckets():
    """The example of the paper's section 2.1: offsets up to 128, beyond which all are one."""
    found = distance_buckets(32, 128)
    assert found[:16].tolist() == list(range(16))
    assert found[127] == found[128] == 31


@pytest.mark.parametrize("causal", [True, False])
def test_every_pair(causal):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(8, 3)).astype(np.float32)
    queries, keys = np.array([[0, 5, 30], [2, 3, 9]]), np.array([[0, 1, 7, 40], [9, 3, 2, 0]])
    found = relative_bias(
        jnp.asarray(table),
        jnp.asarray(queries, jnp.int32),
        jnp.asarray(keys, jnp.int32),
        causal=causal,
        max_distance=12,
    )
    assert found.shape == (2, 3, 3, 4)
    for row in range(2):
        for i, query in enumerate(queries[row]):
            for j, key in enumerate(keys[row]):
                if causal:
                    place = bucket_of(max(0, query - key), 8, 12)
                else:
                    place = bucket_of(abs(query - key), 4, 12) + 4 * (key > query)
                np.testing.assert_array_equal(found[row, :, i, j], table[place])
