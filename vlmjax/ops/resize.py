"""Cubic resizing of position tables, equal to torch's bicubic interpolation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@functools.lru_cache(maxsize=64)
def cubic_matrix(size_in: int, size_out: int, a: float = -0.75) -> np.ndarray:
    """Matrix [size_out, size_in], float64, that resamples one axis with the cubic convolution kernel.

    Equals torch.nn.functional.interpolate(mode="bicubic", align_corners=False, antialias=False) along that
    axis: half-pixel centres, Keys' kernel with a = -0.75, taps outside the axis clamped to its ends.
    (jax.image.resize uses a = -0.5 and drops outside taps: it differs by up to a quarter.)
    The array is shared between callers and read-only.
    """
    centre = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((size_out, size_in))
    for tap in range(4):
        column = np.clip(first + tap, 0, size_in - 1)
        # Several taps can be clamped to the same end, so they are added, not assigned.
        np.add.at(matrix, (np.arange(size_out), column), _keys(np.abs(centre - (first + tap)), a))
    matrix.setflags(write=False)
    return matrix


def _keys(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel at a distance from the sample, in pixels (IEEE ASSP 29(6), 1981)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


def resize_positions(
    positions: Float[Array, "tokens width"],
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    prefix: int = 1,
) -> Float[Array, "new_tokens width"]:
    """Resample a learned position table from one (rows, columns) grid of patches to another.

    The first `prefix` rows (class token) belong to no patch and are kept. The sum of weights is float32 at
    full precision on every device, because a table resized once at import must equal one resized here.
    """
    if grid == new_grid:
        return positions
    patches = positions[prefix:].reshape(*grid, positions.shape[-1])
    rows = jnp.asarray(cubic_matrix(grid[0], new_grid[0]), positions.dtype)
    columns = jnp.asarray(cubic_matrix(grid[1], new_grid[1]), positions.dtype)
    resized = jnp.einsum("ah,bw,hwc->abc", rows, columns, patches, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([positions[:prefix], resized.reshape(-1, positions.shape[-1])])
