"""Chunked cross-entropy against the plain formula in float64: values, gradients, meshes, and its memory."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlmjax.losses.token_cross_entropy import token_cross_entropy
from vlmjax.sharding.activations import on_mesh
from vlmjax.sharding.mesh import BATCH_AXES, make_mesh

TOKENS, WIDTH, VOCAB = 24, 10, 32
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(TOKENS, WIDTH)).astype(np.float32)
KERNEL = RNG.normal(size=(WIDTH, VOCAB)).astype(np.float32)
LABELS = RNG.integers(0, VOCAB, TOKENS).astype(np.int32)
LABELS[:6] = (HIDDEN @ KERNEL).argmax(1)[:6]  # some are right
WEIGHTS = RNG.uniform(0.2, 2.0, TOKENS).astype(np.float32) * (RNG.random(TOKENS) < 0.7)
INPUTS = (HIDDEN, KERNEL, LABELS, WEIGHTS)


def oracle(hidden, kernel, labels, weights, z_loss=0.0):
    """(loss, weight, right) and gradients in float64, one token after the other."""
    hidden, kernel = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    sums, d_hidden, d_kernel = np.zeros(3), np.zeros_like(hidden), np.zeros_like(kernel)
    for i in np.flatnonzero(weights):
        scores = hidden[i] @ kernel
        log_z = np.log(np.exp(scores - scores.max()).sum()) + scores.max()
        loss = log_z - scores[labels[i]] + z_loss * log_z**2
        sums += float(weights[i]) * np.array([loss, 1.0, scores.argmax() == labels[i]])
        slope = np.exp(scores - log_z) * (1 + 2 * z_loss * log_z)
        slope[labels[i]] -= 1
        d_hidden[i] = weights[i] * kernel @ slope
        d_kernel += weights[i] * np.outer(hidden[i], slope)
    return sums, (d_hidden, d_kernel)


def ours(hidden, kernel, labels, weights, **options):
    """The same of the code under test; its loss is doubled on the way, so that a lost factor would show."""

    hidden, kernel, labels, weights = map(jnp.asarray, (hidden, kernel, labels, weights))

    def loss(hidden, kernel):
        sums = token_cross_entropy(hidden, kernel, labels, weights, **options)
        return 2.0 * sums.loss, sums

    (_, sums), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, kernel)
    return sums, jax.tree.map(lambda x: x / 2, grads)


def check(got, want, tolerance):
    np.testing.assert_allclose(np.array([float(x) for x in got[0]]), want[0], rtol=tolerance)
    for mine, reference in zip(got[1], want[1], strict=True):
        error = np.abs(np.asarray(mine, np.float64) - reference).max()
        assert error <= tolerance * np.abs(reference).max()


@pytest.mark.parametrize("chunk", [5, 8, 24, 100, None])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_equals_the_formula_whatever_the_chunk(chunk, z_loss):
    got = jax.jit(lambda *inputs: ours(*inputs, chunk=chunk, z_loss=z_loss))(*INPUTS)
    check(got, oracle(*INPUTS, z_loss=z_loss), 2e-6)
    assert 0 < float(got[0].right) < float(got[0].weight)


def test_bfloat16_states_have_float32_scores_and_a_float32_gradient_of_the_head():
    hidden, kernel = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(KERNEL, jnp.bfloat16).astype(jnp.float32)
    sums, grads = jax.jit(lambda *inputs: ours(*inputs, chunk=7))(hidden, kernel, LABELS, WEIGHTS)
    want = oracle(np.asarray(hidden, np.float64), kernel, LABELS, WEIGHTS)
    np.testing.assert_allclose(np.array([float(x) for x in sums]), want[0], rtol=2e-6)
    assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    # Slopes are rounded to bfloat16 before they are multiplied, 2^-9 of each.
    check((sums, grads), want, 2**-8)


def test_scores_of_hundreds_do_not_overflow():
    got = ours(100 * HIDDEN, KERNEL, LABELS, WEIGHTS, chunk=8)
    check(got, oracle(100 * HIDDEN, KERNEL, LABELS, WEIGHTS), 1e-5)


def test_what_stands_at_tokens_of_weight_0_does_not_matter():
    weights = np.where(np.arange(TOKENS) % 3 == 0, 0.0, WEIGHTS).astype(np.float32)
    hidden, labels = HIDDEN.copy(), LABELS.copy()
    hidden[weights == 0], labels[weights == 0] = np.nan, -100
    check(ours(hidden, KERNEL, labels, weights, chunk=8), oracle(HIDDEN, KERNEL, LABELS, weights), 2e-6)
    sums, grads = ours(HIDDEN, KERNEL, labels, np.zeros_like(WEIGHTS))
    assert not any(np.any(x) for x in jax.tree.leaves((sums, grads)))


@pytest.mark.parametrize("label", [-1, VOCAB])
def test_a_label_outside_the_vocabulary_is_not_silent(label):
    labels = np.where(np.arange(TOKENS) == 4, label, LABELS).astype(np.int32)
    assert np.isnan(ours(HIDDEN, KERNEL, labels, np.ones_like(WEIGHTS))[0].loss)


MESHES = [((2, 2, 2), ("fsdp", "tensor")), ((8, 1, 1), (None, None)), ((1, 4, 2), ("fsdp", "tensor"))]


@pytest.mark.parametrize(("shape", "placed"), MESHES)
def test_over_a_mesh_it_is_the_same_and_the_gradient_of_the_head_is_summed_once(shape, placed):
    kernel = np.concatenate([KERNEL] * 2)[:12]  # 12 rows, which fsdp divides
    hidden = np.concatenate([HIDDEN, HIDDEN[:, :2]], axis=1)
    mesh = make_mesh(*shape)
    rows, head = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((BATCH_AXES,), placed))
    step = on_mesh(mesh)(lambda *inputs: ours(*inputs, chunk=2))
    put = [
        jax.device_put(x, place)
        for x, place in zip((hidden, kernel, LABELS, WEIGHTS), (rows, head, rows, rows), strict=True)
    ]
    run = jax.jit(step, out_shardings=(None, (rows, head))).lower(*put).compile()
    check(run(*put), oracle(hidden, kernel, LABELS, WEIGHTS), 2e-6)
    # Inside the loop devices exchange numbers and states of the 2 tokens that each has, never a part of the head.
    sizes = loop_traffic(run.as_text())
    assert max(sizes, default=0) <= 2 * kernel.shape[0] < kernel.size // mesh.shape["tensor"], sizes


def loop_traffic(text):
    """Elements of every collective's result inside the bodies of loops."""
    inside, sizes = False, []
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY", "HloModule")):
            inside = any(line.startswith(f"%{body} ") for body in bodies)
        found = re.search(r"= \(?\w+\[([\d,]*)\].* (all-reduce|all-gather|reduce-scatter|all-to-all)\(", line)
        if inside and found:
            sizes.append(math.prod(int(size) for size in found[1].split(",") if size))
    return sizes


def test_a_frozen_head_costs_no_gradient_of_its_own():
    def products(argnums):
        grad = jax.grad(lambda *inputs: token_cross_entropy(*inputs, chunk=8).loss, argnums)
        return str(jax.make_jaxpr(grad)(*map(jnp.asarray, INPUTS))).count("dot_general")

    assert (products((0, 1)), products((0,)), products((1,))) == (3, 2, 2)


def test_the_scores_of_all_tokens_are_never_held():
    """8k tokens over Qwen2's vocabulary: 5 GB of scores, of which a step has a sixteenth."""
    tokens, vocab = 8192, 152064
    shapes = [
        ((tokens, 64), jnp.bfloat16),
        ((64, vocab), jnp.float32),
        ((tokens,), jnp.int32),
        ((tokens,), jnp.float32),
    ]
    given = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    compiled = jax.jit(lambda *inputs: ours(*inputs)).lower(*given).compile()
    assert f"[{tokens},{vocab}]" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * tokens * vocab / 2
