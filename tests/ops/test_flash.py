"""Attention by kernels against XLA's: values, gradients, meshes; and which one is taken where."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn_lowering

from vlmjax.ops import flash
from vlmjax.ops.attention import attention
from vlmjax.sharding.activations import on_mesh
from vlmjax.sharding.mesh import batch_sharding, make_mesh

TOKENS = 200  # no whole number of tiles
SEGMENTS = np.repeat([[1, 2, 2, 0, 0], [0, 3, 3, 3, 3]], TOKENS // 5, axis=1).astype(np.int32)


def draw(heads=4, kv_heads=2, batch=2, dim=64, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    sizes = (heads, kv_heads, kv_heads)
    return [jnp.asarray(rng.normal(size=(batch, TOKENS, n, dim)), jnp.float32).astype(dtype) for n in sizes]


@pytest.fixture(autouse=True)
def usual_promotion():
    """The kernel is jax's own, and is written for the usual rules."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def splash(*inputs, **options):
    return flash.splash(*inputs, interpret=True, **options)


def xla(*inputs, **options):
    return attention(*inputs, causal=True, **options)


def value_and_grads(function, inputs, **options):
    loss = lambda *x: (jnp.sin(function(*x, **options)).sum(), function(*x, **options))  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)


@pytest.mark.parametrize(
    ("window", "segments", "kv_heads"),
    [(None, None, 4), (None, SEGMENTS, 2), (50, None, 1), (50, SEGMENTS, 4)],
)
def test_splash_equals_xla(window, segments, kv_heads):
    segments = None if segments is None else jnp.asarray(segments)
    options = {"window": window, "segment_ids": segments}
    inputs = draw(kv_heads=kv_heads)
    (_, got), got_grads = value_and_grads(splash, inputs, **options)
    (_, want), want_grads = value_and_grads(xla, inputs, **options)
    np.testing.assert_allclose(got, want, atol=5e-6)
    for mine, theirs in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_splash_in_bfloat16_is_as_near_as_its_digits():
    inputs = draw(dtype=jnp.bfloat16)
    got, want = splash(*inputs), xla(*(x.astype(jnp.float32) for x in inputs))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.03)


@pytest.mark.parametrize(("shape", "kv_heads"), [((2, 1, 2), 2), ((1, 2, 4), 2)])
def test_splash_over_a_mesh_computes_each_devices_own_heads(shape, kv_heads):
    """Four devices along tensor cannot share two heads of keys: all then compute all heads."""
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    inputs = draw(kv_heads=kv_heads)
    segments = jnp.asarray(SEGMENTS)
    run = jax.jit(on_mesh(mesh)(lambda *x: splash(*x[:3], segment_ids=x[3])))
    put = jax.device_put((*inputs, segments), batch_sharding(mesh))
    np.testing.assert_allclose(run(*put), xla(*inputs, segment_ids=segments), atol=5e-6)


def test_kernels_refuse_what_they_do_not_do():
    q, k, v = draw(kv_heads=4)
    for options in (
        {},
        {"causal": True, "mask": jnp.ones((1, 1, TOKENS, TOKENS), bool)},
        {"causal": True, "dropout_rate": 0.1},
    ):
        with pytest.raises(ValueError, match="attention by 'splash' is causal"):
            attention(q, k, v, implementation="splash", **options)
    with pytest.raises(ValueError, match="use implementation='xla'"):
        attention(q[:, :1], k, v, causal=True, implementation="cudnn")


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_cudnn_is_told_to_be_causal_within_the_window(segments, monkeypatch):
    """Lowered for a GPU that is not here."""
    monkeypatch.setattr(cudnn_lowering, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn_lowering, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn_lowering, "is_cuda_compute_capability_equal", lambda capability: False)
    segments = None if segments is None else jnp.asarray(segments)

    def loss(*inputs):
        form = {"window": 50, "segment_ids": segments, "implementation": "cudnn"}
        return attention(*inputs, causal=True, **form).astype(jnp.float32).sum()

    given = draw(dtype=jnp.bfloat16)
    text = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    )
    bias = "" if segments is None else "ScaleBias"
    targets = set(re.findall(r"__cudnn\$\w+", text))
    assert targets == {f"__cudnn$fmha{bias}Softmax", f"__cudnn$fmha{bias}SoftmaxBackward"}
    settings = text.replace("\\22", '"')
    assert settings.count('"mask_type": "CAUSAL"') == settings.count('"sliding_window_length": 50') == 2


def device(platform, **known):
    return types.SimpleNamespace(platform=platform, **known)


SIZES = {"tokens": 2048, "heads": 8, "kv_heads": 2, "head_dim": 128, "dtype": jnp.bfloat16}


@pytest.mark.parametrize(
    ("where", "tensor", "changes", "wanted"),
    [
        (device("tpu"), 1, {}, "splash"),
        (device("tpu"), 1, {"dtype": jnp.float32, "head_dim": 80}, "splash"),
        (device("tpu"), 1, {"tokens": 512}, "xla"),
        (device("tpu"), 1, {"head_dim": 12}, "xla"),
        (device("tpu"), 2, {}, "splash"),
        (device("tpu"), 4, {}, "xla"),
        (device("gpu"), 4, {}, "cudnn"),
        (device("cuda", compute_capability="9.0"), 1, {"tokens": 512}, "cudnn"),
        (device("gpu", compute_capability="7.5"), 1, {}, "xla"),
        (device("gpu"), 1, {"dtype": jnp.float32}, "xla"),
        (device("gpu"), 1, {"head_dim": 12}, "xla"),
        (device("gpu"), 1, {"head_dim": 192}, "xla"),
        (device("gpu"), 1, {"tokens": 2047}, "xla"),
        (device("cpu"), 1, {}, "xla"),
    ],
)
def test_devices_and_sizes_decide(where, tensor, changes, wanted):
    assert flash._kernel_for(where, tensor, **(SIZES | changes)) == wanted


def test_it_is_the_devices_of_the_mesh_that_decide(monkeypatch):
    assert (
        flash.choose_attention(None, **SIZES) == flash.choose_attention(make_mesh(2, 2, 2), **SIZES) == "xla"
    )
    asked = []
    monkeypatch.setattr(
        flash, "_kernel_for", lambda *where, **sizes: asked.append((where, sizes)) or "splash"
    )
    mesh = make_mesh(2, 2, 2)
    assert flash.choose_attention(mesh, **SIZES) == "splash"
    assert asked == [((mesh.devices.flat[0], 2), SIZES)]
