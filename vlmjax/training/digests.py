"""Digests of arrays: equal for equal bits wherever they lie, and different where a single byte is.

A digest is a sum, over the elements of an array, of their mixed bits and positions. Sums have no order, so that it
does not depend on mesh, placement or number of processes, and the devices compute it where the elements are.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jaxtyping import Array, UInt32

from vlmjax.sharding.mesh import replicated
from vlmjax.sharding.rules import path_of

Tree = Any

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def by_path(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree under their `a/b/c` paths."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def digests(leaves: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Digests of arrays, computed on their devices.

    Every process of a run calls this, and gets the same.

    Returns:
      (16 hexadecimal digits for each array, names of those that hold a value that is not finite).
    """
    if not leaves:
        return {}, []
    meshes = [
        x.sharding.mesh for x in leaves.values() if isinstance(getattr(x, "sharding", 0), NamedSharding)
    ]
    found = np.asarray(_program(replicated(meshes[0]) if meshes else None)(list(leaves.values())))
    words = {name: f"{high:08x}{low:08x}" for name, (high, low, _) in zip(leaves, found, strict=True)}
    return words, [name for name, (*_, wild) in zip(leaves, found, strict=True) if wild]


def host_digest(value: np.ndarray) -> str:
    """The digest of an array in this computer's memory, whatever accelerators there are."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return digests({"": value})[0][""]


@lru_cache(maxsize=8)
def _program(out: Sharding | None) -> Any:
    return jax.jit(lambda leaves: jnp.stack([_digest(x) for x in leaves]), out_shardings=out)


def _digest(x: Array) -> UInt32[Array, " 3"]:
    """Two sums modulo 2^32, and whether a value is not finite.

    Each step of the mixing is a bijection of 32-bit words (the finalizer of MurmurHash3): an element that changes
    always changes the sum. Changes of several elements go unseen once in 2^64.
    """
    wild = ~jnp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.zeros(x.shape, jnp.bool_)
    words = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = jax.lax.bitcast_convert_type(words, _WORDS[words.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = _mix(words ^ (place * jnp.uint32(0x9E3779B1)), 0x85EBCA6B, 0xC2B2AE35)
    # One reduction of all three: XLA vectorises it for a CPU, which it does not for reductions that share their input.
    columns = (mixed, _mix(mixed, 0x2C1B3C6D, 0x297A2D39), wild.astype(jnp.uint32))
    return jnp.stack(jax.lax.reduce(columns, (jnp.uint32(0),) * 3, _add, tuple(range(words.ndim))))


def _add(a: tuple, b: tuple) -> tuple:
    return a[0] + b[0], a[1] + b[1], a[2] | b[2]


def _mix(words: Array, first: int, second: int) -> Array:
    words = (words ^ (words >> jnp.uint32(16))) * jnp.uint32(first)
    words = (words ^ (words >> jnp.uint32(13))) * jnp.uint32(second)
    return words ^ (words >> jnp.uint32(16))
