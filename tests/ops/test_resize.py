"""Cubic resizing against one-pixel-at-a-time sums, and against torch where it is installed."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from vlmjax.ops.resize import cubic_matrix, resize_positions

SIZES = [
    ((3, 3), (9, 9)),
    ((8, 8), (8, 8)),
    ((2, 3), (3, 2)),
    ((7, 5), (4, 11)),
    ((16, 16), (24, 24)),
    ((1, 4), (3, 1)),
]


def kernel(x, a=-0.75):
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def slow_bicubic(image, rows, columns):
    """Each output pixel: sixteen clamped taps, in float64."""
    height, width, _ = image.shape
    out = np.zeros((rows, columns, image.shape[2]))
    for r, c in np.ndindex(rows, columns):
        y, x = (r + 0.5) * height / rows - 0.5, (c + 0.5) * width / columns - 0.5
        for i in range(math.floor(y) - 1, math.floor(y) + 3):
            for j in range(math.floor(x) - 1, math.floor(x) + 3):
                pixel = image[min(max(i, 0), height - 1), min(max(j, 0), width - 1)]
                out[r, c] += kernel(y - i) * kernel(x - j) * pixel
    return out


def table(grid, width=6, prefix=1):
    return np.random.default_rng(0).normal(size=(prefix + math.prod(grid), width)).astype(np.float32)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_equals_slow_sums(old, new):
    positions = table(old)
    got = np.asarray(resize_positions(jnp.asarray(positions), old, new))
    want = slow_bicubic(positions[1:].reshape(*old, -1).astype(np.float64), *new)
    np.testing.assert_array_equal(got[0], positions[0])
    np.testing.assert_allclose(got[1:], want.reshape(-1, 6), atol=2e-6)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_equals_torch(old, new):
    torch = pytest.importorskip("torch")
    positions = table(old)
    # In doubles: in floats torch also rounds where it samples, which moves its own result by up to 5e-6.
    image = torch.from_numpy(positions[1:].reshape(1, *old, -1)).permute(0, 3, 1, 2).double()
    want = torch.nn.functional.interpolate(image, size=new, mode="bicubic", align_corners=False)
    got = np.asarray(resize_positions(jnp.asarray(positions), old, new))[1:].reshape(*new, -1)
    np.testing.assert_allclose(got, want[0].permute(1, 2, 0).numpy(), atol=2e-6)


def test_rows_sum_to_one_and_cannot_be_changed():
    matrix = cubic_matrix(5, 13)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-12)
    with pytest.raises(ValueError, match="read-only"):
        matrix[0, 0] = 1.0


def test_prefix_tokens_are_kept():
    positions = jnp.asarray(table((4, 4), prefix=3))
    resized = resize_positions(positions, (4, 4), (2, 5), prefix=3)
    assert resized.shape == (13, 6)
    np.testing.assert_array_equal(resized[:3], positions[:3])
    np.testing.assert_array_equal(resized[3:], resize_positions(positions[2:], (4, 4), (2, 5))[1:])
