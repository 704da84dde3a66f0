"""Norms against double precision, where single-pass formulas fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmjax.ops.norms import l2_normalize, layer_norm, rms_norm


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_layer_norm_with_a_large_mean(offset):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 4, 40)) + offset).astype(np.float32)
    scale, bias = rng.normal(size=(2, 40)).astype(np.float32)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(
        exact.var(-1, keepdims=True) + 1e-5
    ) * scale + bias
    # A mean of 100 is known to 4e-6; the one-pass variance would be off by a thousandth.
    np.testing.assert_allclose(
        layer_norm(*map(jnp.asarray, (x, scale, bias)), 1e-5), exact, atol=4e-5 if offset else 3e-6
    )


def test_layer_norm_of_bfloat16_is_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)), jnp.bfloat16)
    got = layer_norm(x, jnp.ones(8), jnp.zeros(8), 1e-5)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, layer_norm(x.astype(jnp.float32), jnp.ones(8), jnp.zeros(8), 1e-5))


def test_l2_normalize():
    x = (
        np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
        * np.array([1e-4, 1, 10, 1e3, 1e6], np.float32)[:, None]
    )
    want = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    np.testing.assert_allclose(l2_normalize(jnp.asarray(x)), want, rtol=1e-6)


def test_l2_normalize_of_zeros_is_zeros_with_finite_gradient():
    value, grad = jax.value_and_grad(lambda x: l2_normalize(x).sum())(jnp.zeros((2, 4)))
    assert value == 0.0
    assert np.isfinite(grad).all()


def test_rms_norm_divides_in_float32_and_rounds_before_it_scales():
    x = np.random.default_rng(3).normal(size=(2, 5, 64)) + 1.0
    scale = np.random.default_rng(4).uniform(0.5, 2.0, 64)
    unit = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1)
    got = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), 0.1)
    np.testing.assert_allclose(got, unit * scale, rtol=2e-6)
    rough, wide = jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale, jnp.float32)
    exact = np.asarray(rough, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 0.1)
    want = jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16) * wide.astype(jnp.bfloat16)[None, None]
    got = rms_norm(rough, wide, 0.1)
    assert got.dtype == jnp.bfloat16
    assert (np.asarray(got) == np.asarray(want)).mean() > 0.99  # a tie may be rounded to either side
