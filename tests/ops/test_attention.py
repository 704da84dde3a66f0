"""Attention against loops in float64, and what happens where nothing may be seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmjax.ops.attention import attention, causal_mask, combine_masks, merge_heads, padding_mask, split_heads


def slow_attention(q, k, v, allowed, bias, scale):
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, i, h in np.ndindex(*q.shape[:3]):
        seen = [j for j in range(k.shape[1]) if allowed[b, h, i, j]]
        scores = np.array([scale * q[b, i, h] @ k[b, j, h] + bias[b, h, i, j] for j in seen])
        weights = np.exp(scores - scores.max(initial=-np.inf))
        for weight, j in zip(weights / weights.sum(), seen, strict=True):
            out[b, i, h] += weight * v[b, j, h]
    return out


def draw(queries=5, keys=5, batch=2, heads=3, dim=4, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(batch, n, heads, dim)).astype(np.float32) for n in (queries, keys, keys)]


def test_equals_loops_with_mask_bias_and_scale():
    q, k, v = draw(queries=4, keys=6)
    rng = np.random.default_rng(1)
    mask = rng.random((2, 1, 4, 6)) < 0.6
    mask[..., 0] = True
    bias = rng.normal(size=(1, 3, 4, 6)).astype(np.float32)
    got = attention(*map(jnp.asarray, (q, k, v)), mask=jnp.asarray(mask), bias=jnp.asarray(bias), scale=0.7)
    full = (2, 3, 4, 6)
    want = slow_attention(q, k, v, np.broadcast_to(mask, full), np.broadcast_to(bias, full), 0.7)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_scale_is_one_over_root_of_head_dim_unless_given():
    q, k, v = map(jnp.asarray, draw(dim=16))
    np.testing.assert_array_equal(attention(q, k, v), attention(q, k, v, scale=0.25))


@pytest.mark.parametrize("queries", [5, 2])
def test_causal_aligns_the_last_query_with_the_last_key(queries):
    q, k, v = draw(queries=queries)
    got = attention(*map(jnp.asarray, (q, k, v)), causal=True)
    full = (2, 3, queries, 5)
    allowed = np.array([[j <= i + 5 - queries for j in range(5)] for i in range(queries)])
    want = slow_attention(q, k, v, np.broadcast_to(allowed, full), np.zeros(full), 0.5)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_causal_and_padding_hide_together():
    q, k, v = draw()
    lengths = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], np.int32)
    got = attention(*map(jnp.asarray, (q, k, v)), mask=padding_mask(jnp.asarray(lengths)), causal=True)
    allowed = np.array([[[[j <= i and lengths[b, j] for j in range(5)] for i in range(5)]] for b in range(2)])
    allowed = np.broadcast_to(allowed, (2, 3, 5, 5)).copy()
    want = np.zeros_like(q)
    rows = allowed.any(-1)[:, 0]
    allowed[~allowed.any(-1)] = True  # any value: those rows are compared with zeros
    slow = slow_attention(q, k, v, allowed, np.zeros(allowed.shape), 0.5)
    want[rows] = slow[rows]
    assert not rows.all()
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_a_query_that_sees_nothing_gives_zeros_and_finite_gradients():
    q, k, v = map(jnp.asarray, draw())
    mask = padding_mask(jnp.asarray([[0, 0, 0, 0, 0], [1, 1, 0, 0, 0]], jnp.int32))
    np.testing.assert_array_equal(attention(q, k, v, mask=mask)[0], 0.0)
    grads = jax.grad(lambda *x: jnp.sin(attention(*x, mask=mask)).sum(), argnums=(0, 1, 2))(q, k, v)
    for grad in grads:
        assert np.isfinite(grad).all()
        np.testing.assert_array_equal(grad[0], 0.0)
        assert np.abs(grad[1]).max() > 0


def test_bfloat16_is_softened_in_float32():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw(queries=64, keys=64, dim=8))
    got = attention(q, k, v)
    assert got.dtype == jnp.bfloat16
    exact = slow_attention(
        *(np.asarray(x, np.float64) for x in (q, k, v)),
        np.ones((2, 3, 64, 64)),
        np.zeros((2, 3, 64, 64)),
        8**-0.5,
    )
    # Only the weights and the result are rounded (2^-9 relative each), not the scores.
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, atol=2**-8)


def test_dropout_keeps_the_expectation_and_needs_a_key():
    q, k, v = map(jnp.asarray, draw())
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = jax.jit(jax.vmap(lambda key: attention(q, k, v, dropout_rate=0.3, dropout_key=key)))(keys)
    assert np.abs(drawn[0] - drawn[1]).max() > 0.01
    np.testing.assert_allclose(drawn.mean(0), attention(q, k, v), atol=0.08)
    with pytest.raises(ValueError, match="dropout_key"):
        attention(q, k, v, dropout_rate=0.3)


def test_masks_and_heads():
    assert combine_masks(None, None) is None
    np.testing.assert_array_equal(causal_mask(2, 3)[0, 0], [[True, True, False], [True, True, True]])
    x = jnp.arange(24.0).reshape(1, 2, 12)
    assert split_heads(x, 3).shape == (1, 2, 3, 4)
    np.testing.assert_array_equal(split_heads(x, 3)[0, 0, 1], [4.0, 5.0, 6.0, 7.0])
    np.testing.assert_array_equal(merge_heads(split_heads(x, 3)), x)


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 0, 3, 3, 3, 3, 3, 5, 5]], np.int32)


def seen_by(tokens, window, segments):
    """Which token may look at which, one pair after the other."""
    allowed = np.zeros((2, 1, tokens, tokens), bool)
    for b, i, j in np.ndindex(2, tokens, tokens):
        near = j <= i and (window is None or i - j < window)
        together = segments is None or segments[b, i] == segments[b, j] != 0
        allowed[b, 0, i, j] = near and together
    return allowed


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_shared_heads_windows_and_segments(kv_heads, window, segments):
    q = draw(9, 9, heads=6)[0]
    k, v = draw(9, 9, heads=kv_heads, seed=1)[1:]
    given = None if segments is None else jnp.asarray(segments)
    got = attention(*map(jnp.asarray, (q, k, v)), causal=True, window=window, segment_ids=given)
    repeated = [np.repeat(x, 6 // kv_heads, axis=2) for x in (k, v)]
    allowed = seen_by(9, window, segments)
    empty = ~allowed.any(-1)[:, 0]
    full = np.broadcast_to(allowed | empty[:, None, :, None], (2, 6, 9, 9))
    want = slow_attention(q, *repeated, full, np.zeros((2, 6, 9, 9)), 0.5)
    want[empty] = 0.0
    np.testing.assert_allclose(got, want, atol=2e-6)
    assert empty.any() == (segments is not None)


def test_shared_heads_are_not_repeated():
    """Keys and values go into products as they are."""
    q, k, v = (jnp.zeros((1, 8, heads, 16)) for heads in (8, 2, 2))
    program = jax.make_jaxpr(jax.jit(lambda *x: attention(*x, causal=True), inline=True))(q, k, v).jaxpr
    assert users(program, program.invars[1:]) == {"dot_general"}


def users(program, variables):
    """Names of the primitives that take one of these variables, inside called functions too."""
    names = set()
    for equation in program.eqns:
        taken = [i for i, x in enumerate(equation.invars) if any(x is variable for variable in variables)]
        inner = equation.params.get("jaxpr")
        if taken and inner is not None:
            names |= users(inner.jaxpr, [inner.jaxpr.invars[i] for i in taken])
        elif taken:
            names.add(equation.primitive.name)
    return names
