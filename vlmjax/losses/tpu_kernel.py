"""The tiles of one block as TPU kernels: scores are multiplied, exponentiated and summed without leaving the core.

They serve the plain loss, one positive for each row and no teacher; vlmjax/losses/blocks.py has the rest, and the same
results. Scores are in units of log2 inside, since that is the exponential a TPU has.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from vlmjax.losses.tiles import EXCLUDED, Rows, Slopes, Sums, Terms, merge

LOG2E = math.log2(math.e)
LANES, SUBLANES = 128, 8
# Rows and columns of what one grid step multiplies, and of the parts it is cut into so that one part's exponentials
# overlap the next part's product.
TILE = 512
ROWS = 256  # blocks are a multiple of this long
PART = (256, 512)
# Gradients of so many rows stay on the core while the columns pass (v5e: 128 MiB in all).
RESIDENT_BYTES = 16 * 2**20
MOST_KEYS = 512 * 1024  # of which a core holds maxima and sums, 64 bytes each, twice
_MEMORY = pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=100 * 2**20)


def serves(terms: Terms | None, keys: int, width: int, dtype: Any) -> bool:
    """Whether these kernels compute the sums that a loss asks for, and those of so many keys stay on the core."""
    return terms == Terms() and keys <= MOST_KEYS and width % LANES == 0 and jnp.dtype(dtype) == jnp.bfloat16


def block_sums(
    queries: Rows, sums: Sums, keys: Rows, key_sums: Sums | None, scale: Array, interpret: bool = False
) -> tuple[Sums, Sums | None]:
    """As `blocks.block_sums`: the sums of queries and of keys after they have met. Lengths are multiples of 256."""
    row_max, row_sum, column_max, column_sum = _forward(queries, keys, scale, interpret)
    along_rows = _fold(row_max, row_sum, 1)
    sums = merge(sums, along_rows, Terms())
    if key_sums is not None:
        key_sums = merge(key_sums, _fold(column_max, column_sum, 0), Terms())
    return sums, key_sums


def _fold(best: Array, total: Array, axis: int) -> Sums:
    """The sums over lanes or sublanes, each of which held its own share of the keys."""
    overall = best.max(axis)
    total = (total * jnp.exp2(best - jnp.expand_dims(overall, axis))).sum(axis)
    return Sums(overall / LOG2E, (total,))


def _labels(rows: Rows) -> Array:
    """int32 [rows]: the id, or -1 for a row that does not count. Ids are row numbers here."""
    return jnp.where(rows.valid, rows.ids.astype(jnp.int32), -1)


def _tile_of(rows: int) -> int:
    return TILE if rows % TILE == 0 else ROWS


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    dimensions = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _forward(queries: Rows, keys: Rows, scale: Array, interpret: bool) -> tuple[Array, ...]:
    """Maxima and sums of rows, [rows, 128] with a share of the keys in each lane, and of columns, [8, columns]."""
    (m, width), k = queries.embeds.shape, len(keys.ids)
    tm, tn = _tile_of(m), _tile_of(k)
    by_row = pl.BlockSpec((tm, LANES), lambda i, j: (i, 0))
    by_column = pl.BlockSpec((SUBLANES, k), lambda i, j: (0, 0))
    like = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return pl.pallas_call(
        functools.partial(_forward_kernel, parts=(min(tm, PART[0]), min(tn, PART[1]))),
        grid=(m // tm, k // tn),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((tm, width), lambda i, j: (i, 0)),
            pl.BlockSpec((tn, width), lambda i, j: (j, 0)),
            pl.BlockSpec((tm, 1), lambda i, j: (i, 0)),
            pl.BlockSpec((1, tn), lambda i, j: (0, j)),
        ],
        out_specs=[by_row, by_row, by_column, by_column],
        out_shape=[like((m, LANES)), like((m, LANES)), like((SUBLANES, k)), like((SUBLANES, k))],
        cost_estimate=pl.CostEstimate(
            flops=2 * m * k * width,
            transcendentals=2 * m * k,
            bytes_accessed=2 * width * (m + k * (m // tm)),
        ),
        compiler_params=_MEMORY,
        interpret=interpret,
        name="info_nce_forward",
    )(
        (scale * LOG2E).reshape(1),
        queries.embeds,
        keys.embeds,
        _labels(queries)[:, None],
        _labels(keys)[None, :],
    )


def _forward_kernel(
    scale, x_ref, y_ref, row_label_ref, column_label_ref, row_max, row_sum, column_max, column_sum, *, parts
):
    """One tile. No reduction crosses lanes or sublanes: that is left for the end, outside."""
    i, j = pl.program_id(0), pl.program_id(1)
    (tm, _), (tn, _), (pm, pn) = x_ref.shape, y_ref.shape, parts
    bias = lambda labels: jnp.where(labels < 0, EXCLUDED, 0.0)  # noqa: E731

    def columns_of(q: int):
        return pl.ds(pl.multiple_of(j * tn + q * pn, LANES), pn)

    # Selected, not branched on: one basic block, whose products and exponentials the scheduler can overlap.
    best_c = [jnp.where(i == 0, EXCLUDED, column_max[:, columns_of(q)]) for q in range(tn // pn)]
    total_c = [jnp.where(i == 0, 0.0, column_sum[:, columns_of(q)]) for q in range(tn // pn)]
    for p in range(tm // pm):
        rows = slice(p * pm, (p + 1) * pm)
        best = jnp.where(j == 0, EXCLUDED, row_max[rows, :])
        total = jnp.where(j == 0, 0.0, row_sum[rows, :])
        row_label = row_label_ref[rows, :]
        row_bias = bias(row_label)
        for q in range(tn // pn):
            columns = slice(q * pn, (q + 1) * pn)
            column_label = column_label_ref[:, columns]
            scores = _dot(x_ref[rows, :], y_ref[columns, :], 1, 1) * scale[0]
            scores = scores + row_bias + bias(column_label)
            scores = jnp.where(row_label == column_label, EXCLUDED, scores)
            lanes = [scores[:, g : g + LANES] for g in range(0, pn, LANES)]
            new = functools.reduce(jnp.maximum, lanes, best)
            total = total * jnp.exp2(best - new) + sum(jnp.exp2(lane - new) for lane in lanes)
            best = new
            sublanes = scores.reshape(pm // SUBLANES, SUBLANES, pn)
            new = jnp.maximum(best_c[q], sublanes.max(0))
            total_c[q] = total_c[q] * jnp.exp2(best_c[q] - new) + jnp.exp2(sublanes - new[None]).sum(0)
            best_c[q] = new
        row_max[rows, :] = best
        row_sum[rows, :] = total
    for q in range(tn // pn):
        column_max[:, columns_of(q)] = best_c[q]
        column_sum[:, columns_of(q)] = total_c[q]


def block_gradients(
    queries: tuple[Rows, Slopes],
    d_queries: Array,
    keys: tuple[Rows, Slopes | None],
    d_keys: Array | None,
    scale: Array,
    interpret: bool = False,
) -> tuple[Array, Array | None]:
    """As `blocks.block_gradients`: gradients before the factor `scale`, fp32, added to what is there."""
    (rows, row_slopes), (columns, column_slopes) = queries, keys
    m, width = rows.embeds.shape
    both = column_slopes is not None
    if not both:  # a bank: its slopes are zero, and what is summed for it is thrown away
        zero = jnp.zeros(len(columns.ids), jnp.float32)
        column_slopes, d_keys = Slopes(zero, (zero,)), jnp.zeros(columns.embeds.shape, jnp.float32)
    of_rows, of_columns = _packed(row_slopes), _packed(column_slopes).T
    row_labels, column_labels = _labels(rows)[:, None], _labels(columns)[None, :]
    chunk = min(m, max(RESIDENT_BYTES // (4 * width) // TILE, 1) * TILE)

    def some(d_queries: Array, d_keys: Array, start: Array | int, count: int) -> tuple[Array, Array]:
        part = lambda x: lax.dynamic_slice_in_dim(x, start, count)  # noqa: E731
        d_rows, d_keys = _backward(
            part(rows.embeds),
            columns.embeds,
            part(of_rows),
            of_columns,
            part(row_labels),
            column_labels,
            part(d_queries),
            d_keys,
            scale,
            interpret,
        )
        return lax.dynamic_update_slice_in_dim(d_queries, d_rows, start, 0), d_keys

    d_queries, d_keys = lax.fori_loop(
        0, m // chunk, lambda n, carry: some(*carry, n * chunk, chunk), (d_queries, d_keys)
    )
    if m % chunk:
        d_queries, d_keys = some(d_queries, d_keys, m - m % chunk, m % chunk)
    return d_queries, d_keys if both else None


def _packed(slopes: Slopes) -> Array:
    """[rows, 2]: maximum, in units of log2, and rate."""
    return jnp.stack([slopes.negative_max * LOG2E, slopes.negative_rate[0]], axis=1)


def _backward(
    x, y, of_rows, of_columns, row_labels, column_labels, d_rows, d_columns, scale, interpret
) -> tuple[Array, Array]:
    (m, width), k = x.shape, len(y)
    tm, tn = _tile_of(m), _tile_of(k)
    resident = pl.BlockSpec(memory_space=pltpu.VMEM)
    by_column = pl.BlockSpec((tn, width), lambda j, i: (j, 0))
    return pl.pallas_call(
        _backward_kernel,
        grid=(k // tn, m // tm),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((tm, width), lambda j, i: (i, 0)),
            by_column,
            pl.BlockSpec((tm, 2), lambda j, i: (i, 0)),
            pl.BlockSpec((2, tn), lambda j, i: (0, j)),
            pl.BlockSpec((tm, 1), lambda j, i: (i, 0)),
            pl.BlockSpec((1, tn), lambda j, i: (0, j)),
            resident,
            by_column,
        ],
        out_specs=[resident, by_column],
        out_shape=[jax.ShapeDtypeStruct(d.shape, jnp.float32) for d in (d_rows, d_columns)],
        input_output_aliases={7: 0, 8: 1},
        cost_estimate=pl.CostEstimate(
            flops=6 * m * k * width,
            transcendentals=2 * m * k,
            bytes_accessed=2 * width * (k + m * (k // tn)) + 8 * width * (m + k),
        ),
        compiler_params=_MEMORY,
        interpret=interpret,
        name="info_nce_backward",
    )((scale * LOG2E).reshape(1), x, y, of_rows, of_columns, row_labels, column_labels, d_rows, d_columns)


def _backward_kernel(
    scale,
    x_ref,
    y_ref,
    of_rows_ref,
    of_columns_ref,
    row_label_ref,
    column_label_ref,
    d_rows_in,
    d_columns_in,
    d_rows_ref,
    d_columns_ref,
):
    """One tile: its scores once more, their slopes, both products with them. Rows are the inner axis of the grid."""
    j, i = pl.program_id(0), pl.program_id(1)
    x, y = x_ref[...], y_ref[...]
    scores = _dot(x, y, 1, 1) * scale[0]
    # No negative lies above its maximum; a key that does not count may, and must not overflow.
    along_rows = jnp.exp2(jnp.minimum(scores - of_rows_ref[:, 0:1], 0.0)) * of_rows_ref[:, 1:2]
    along_columns = jnp.exp2(jnp.minimum(scores - of_columns_ref[0:1, :], 0.0)) * of_columns_ref[1:2, :]
    slopes = jnp.where(row_label_ref[...] == column_label_ref[...], 0.0, along_rows + along_columns)
    slopes = slopes.astype(x.dtype)
    rows = pl.ds(pl.multiple_of(i * len(x), SUBLANES), len(x))

    @pl.when(j == 0)
    def _():
        d_rows_ref[rows, :] = d_rows_in[rows, :]

    @pl.when(i == 0)
    def _():
        d_columns_ref[...] = d_columns_in[...]

    d_rows_ref[rows, :] += _dot(slopes, y, 1, 0)
    d_columns_ref[...] += _dot(slopes, x, 0, 0)
