"""Digests: what they are, that placement does not change them and that any change of a byte does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlmjax.sharding.mesh import make_mesh
from vlmjax.training.digests import by_path, digests, host_digest

MASK = 0xFFFFFFFF
DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "bool")


def oracle(x):
    """Element by element, in Python's own integers."""
    x = np.asarray(x)
    bits = x.astype(np.uint8) if x.dtype == bool else x.view(f"u{x.dtype.itemsize}")

    def mix(word, first, second):
        word = (word ^ word >> 16) * first & MASK
        word = (word ^ word >> 13) * second & MASK
        return word ^ word >> 16

    high = low = 0
    for place, word in enumerate(bits.ravel().tolist()):
        mixed = mix(word ^ (place * 0x9E3779B1 & MASK), 0x85EBCA6B, 0xC2B2AE35)
        high, low = high + mixed & MASK, low + mix(mixed, 0x2C1B3C6D, 0x297A2D39) & MASK
    return f"{high:08x}{low:08x}"


def values(dtype, shape=(16, 8, 3)):
    x = np.random.default_rng(0).normal(size=shape) * 100
    return jnp.asarray((x > 0) if dtype == "bool" else x.astype(np.int32)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_they_are(dtype):
    x = values(dtype)
    assert digests({"a": x, "b": x[0, 0, 0]}) == ({"a": oracle(x), "b": oracle(x[0, 0, 0])}, [])
    assert host_digest(np.asarray(x)) == oracle(x)


def test_placement_does_not_change_them():
    x, y = values("float32"), values("bfloat16")
    found = []
    for mesh in (make_mesh(data=8), make_mesh(data=2, fsdp=2, tensor=2)):
        for spec in (PartitionSpec(), PartitionSpec("data", "tensor"), PartitionSpec(("data", "fsdp"), None)):
            place = NamedSharding(mesh, spec)
            found.append(digests({"x": jax.device_put(x, place), "y": jax.device_put(y, place)}))
    assert all(each == ({"x": oracle(x), "y": oracle(y)}, []) for each in found)


def test_every_bit_and_every_place_counts():
    x = np.asarray(values("float32", (4, 4)))
    seen = {host_digest(x)}
    for place in range(16):
        for bit in range(32):
            words = x.view(np.uint32).copy()
            words.flat[place] ^= np.uint32(1 << bit)
            seen.add(host_digest(words.view(np.float32)))
    assert len(seen) == 1 + 16 * 32
    assert len({host_digest(y) for y in (x, x.T.copy(), x[::-1].copy(), np.roll(x, 1, 1))} - seen) == 3


def test_what_is_not_finite_is_named():
    tree = {
        "a": jnp.array([1.0, jnp.inf]),
        "b": {"c": jnp.float32(jnp.nan)},
        "d": jnp.ones(2),
        "e": jnp.int32(1),
    }
    assert digests(by_path(tree))[1] == ["a", "b/c"]
    assert digests({}) == ({}, [])
