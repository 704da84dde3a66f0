"""One block of queries against one block of keys on one device, tile by tile: no more of the matrix ever exists."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jaxtyping import Array

from vlmjax.losses.tiles import (
    Rows,
    Slopes,
    Sums,
    Terms,
    merge,
    product,
    tile_gradient,
    tile_sums,
)

Tree = Any


def over_tiles(
    tile: tuple[int, int],
    rows: Tree,
    row_state: Tree,
    columns: Tree,
    column_state: Tree,
    visit: Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree]],
) -> tuple[Tree, Tree]:
    """Visit every tile: `visit(rows, row_state, columns, column_state)` returns both states after this tile.

    All leaves are [n, ...] with n a multiple of the tile's side; states are changed in place where they can be.
    """
    row_tiles, column_tiles = (
        len(jax.tree.leaves(x)[0]) // side for x, side in zip((rows, columns), tile, strict=True)
    )
    if row_tiles == column_tiles == 1:
        return visit(rows, row_state, columns, column_state)
    rows, row_state = _cut(rows, row_tiles), _cut(row_state, row_tiles)

    def down(row_state: Tree, column: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        keys, state = column

        def one(i: Array, carry: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
            row_state, state = carry
            new, state = visit(_at(rows, i), _at(row_state, i), keys, state)
            put = lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0)  # noqa: E731
            return jax.tree.map(put, row_state, new), state

        return lax.fori_loop(0, row_tiles, one, (row_state, state))

    row_state, column_state = lax.scan(
        down, row_state, (_cut(columns, column_tiles), _cut(column_state, column_tiles))
    )
    return _joined(row_state), _joined(column_state)


def _cut(tree: Tree, tiles: int) -> Tree:
    return jax.tree.map(lambda x: x.reshape(tiles, x.shape[0] // tiles, *x.shape[1:]), tree)


def _joined(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _at(tree: Tree, i: Array) -> Tree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 0, keepdims=False), tree)


def block_sums(
    tile: tuple[int, int],
    queries: Rows,
    sums: Sums,
    keys: Rows,
    key_sums: Sums | None,
    scale: Array,
    teacher_scale: Array,
    terms: Terms,
) -> tuple[Sums, Sums | None]:
    """The sums of queries and, unless they are None, of keys, after they have met."""

    def visit(rows: Rows, row_sums: Sums, columns: Rows, column_sums: Sums | None) -> tuple:
        both = column_sums is not None
        along_rows, along_columns = tile_sums(rows, columns, scale, teacher_scale, terms, both)
        return merge(row_sums, along_rows, terms), merge(column_sums, along_columns, terms)

    return over_tiles(tile, queries, sums, keys, key_sums, visit)


def block_gradients(
    tile: tuple[int, int],
    queries: tuple[Rows, Slopes],
    d_queries: Array,
    keys: tuple[Rows, Slopes | None],
    d_keys: Array | None,
    scale: Array,
    teacher_scale: Array,
    terms: Terms,
) -> tuple[Array, Array | None]:
    """Gradients with respect to the features, before the factor `scale`, fp32, added to what is there."""

    def visit(rows: tuple, d_rows: Array, columns: tuple, d_columns: Array | None) -> tuple:
        gradient = tile_gradient(*rows, *columns, scale, teacher_scale, terms)
        # What is left after positives are subtracted is rounded to the features' own dtype, so that bf16 features are
        # multiplied at full speed; the sums are fp32.
        gradient = gradient.astype(rows[0].embeds.dtype)
        d_rows = d_rows + product(gradient, columns[0].embeds, 1, 0)
        if d_columns is not None:
            d_columns = d_columns + product(gradient, rows[0].embeds, 0, 0)
        return d_rows, d_columns

    return over_tiles(tile, queries, d_queries, keys, d_keys, visit)
