"""Rotary positions against complex numbers, scaled frequencies against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from vlmjax.errors import RecipeError
from vlmjax.ops.rotary import Rope, angles, frequencies, rotate

RNG = np.random.default_rng(0)
LLAMA3 = Rope(theta=5e5, scaling="llama3", factor=8.0, original_max_length=8192)


def turned(x, positions, theta=1e4):
    """Channels i and i + n/2 as real and imaginary part, multiplied by exp(i position theta^(-2i/n))."""
    half = x.shape[-1] // 2
    numbers = x[..., :half] + 1j * x[..., half:]
    for pair in range(half):
        turn = np.exp(1j * positions * theta ** (-2 * pair / x.shape[-1]))
        numbers[..., pair] *= turn[:, :, None]
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def test_equals_multiplication_by_complex_numbers():
    x = RNG.normal(size=(2, 5, 3, 8))
    positions = RNG.integers(0, 300, (2, 5))
    got = rotate(jnp.asarray(x, jnp.float32), angles(Rope(), jnp.asarray(positions), 8))
    np.testing.assert_allclose(got, turned(x, positions), atol=5e-5)


def test_scores_depend_on_distance_alone():
    q, k = (jnp.asarray(RNG.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(i, j):
        at = [angles(Rope(), jnp.asarray([[p]]), 16) for p in (i, j)]
        return float((rotate(q, at[0]) * rotate(k, at[1])).sum())

    assert score(7, 4) == pytest.approx(score(103, 100), abs=1e-4)
    assert score(7, 4) != pytest.approx(score(7, 5), abs=1e-2)


def test_far_positions_keep_their_digits_in_bfloat16():
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    got = rotate(x, angles(Rope(), jnp.asarray([[100_001, 100_002]]), 8))
    assert got.dtype == jnp.bfloat16
    want = turned(np.ones((1, 2, 1, 8)), np.array([[100_001, 100_002]]))
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.01)


def test_linear_scaling_is_positions_divided():
    slow = frequencies(Rope(scaling="linear", factor=4.0), 32)
    np.testing.assert_allclose(slow, frequencies(Rope(), 32) / 4, rtol=1e-6)


def test_llama3_keeps_short_waves_stretches_long_ones_and_blends_between():
    plain, scaled = frequencies(Rope(theta=5e5), 128), frequencies(LLAMA3, 128)
    waves = 2 * np.pi / plain
    short, long = waves < 8192 / 4, waves > 8192 / 1
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    for wave, before, after in zip(*(x[~short & ~long] for x in (waves, plain, scaled)), strict=True):
        smooth = (8192 / wave - 1) / (4 - 1)
        np.testing.assert_allclose(after, (1 - smooth) * before / 8 + smooth * before, rtol=1e-5)
    assert short.any() and long.any() and (~short & ~long).any()


def test_what_has_no_angles_is_refused():
    with pytest.raises(RecipeError, match="scaling is 'yarn'; choose one of none, linear, llama3"):
        Rope(scaling="yarn")
    with pytest.raises(RecipeError, match="factor is 0.0"):
        Rope(factor=0.0)
    with pytest.raises(RecipeError, match="high_freq_factor 1.0 must be above"):
        Rope(high_freq_factor=1.0)
