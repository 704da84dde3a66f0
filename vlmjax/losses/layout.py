"""How the rows of one device are cut into tiles, and the padding that makes them fit."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vlmjax.losses import tpu_kernel
from vlmjax.losses.tiles import Terms
from vlmjax.losses.travel import Route

Tree = Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the pairs are computed; static."""

    route: Route = Route()
    terms: Terms = Terms()
    tile: int = 1024  # rows and columns of a tile, at most
    both: bool = True  # sums of keys over queries too; False: keys are a bank, without sums or gradient
    kernel: str = (
        "xla"  # what computes a block: xla | pallas (TPU) | interpreted (that kernel anywhere, slowly)
    )


def padded(plan: Plan, queries: Tree, keys: Tree) -> tuple:
    """Both sides, one device's rows of each, with rows that no pair counts until tiles fit.

    Returns both sides, rows and columns of a tile, and how many rows each side had.
    """
    counts = tuple(len(jax.tree.leaves(side)[0]) for side in (queries, keys))
    parts = 2 if plan.route.two_way else 1
    tiles = [tile_rows(count, plan.tile, n) for count, n in zip(counts, (1, parts), strict=True)]
    if plan.kernel != "xla":  # it cuts blocks itself
        tiles = [tpu_kernel.ROWS, tpu_kernel.ROWS]
    padded = (
        pad_rows(side, -(-count // unit) * unit)
        for side, count, unit in zip((queries, keys), counts, (tiles[0], tiles[1] * parts), strict=True)
    )
    columns = tiles[1]
    if plan.route.gather:
        length = -(-counts[1] // columns)
        columns = tile_columns(columns, length * plan.route.gathered, plan.tile)
    return tuple(padded), (tiles[0], columns), counts


def tile_rows(rows: int, most: int, parts: int = 1) -> int:
    """Rows of a tile, at most about `most`, so that `parts` equal parts of `rows` rows are cut with little padding."""
    part = -(-rows // parts)
    tiles = -(-part // most)
    return part if tiles == 1 else -(-part // (8 * tiles)) * 8


def tile_columns(tile: int, blocks: int, most: int) -> int:
    """Columns of a tile of `blocks` gathered blocks that are each a multiple of `tile`: whole tiles, at most `most`."""
    together = max(n for n in range(1, blocks + 1) if blocks % n == 0 and (n == 1 or n * tile <= most))
    return tile * together


def pad_rows(tree: Tree, rows: int) -> Tree:
    """Zeros (and False) appended to every leaf until it has `rows` rows."""

    def pad(x: Array) -> Array:
        missing = rows - x.shape[0]
        return jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) if missing else x

    return jax.tree.map(pad, tree)
