"""The image tower against the numpy form; sizes, dtypes, recomputation, patch dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import towers_oracle as oracle
from tiny_models import VIT, change, images, make_params

from vlmjax.errors import RecipeError, UserError
from vlmjax.models.vit import Vit, check_pixels, drop_patches, patchify
from vlmjax.ops.resize import resize_positions


def run(config, params, pixels, **kwargs):
    return jax.jit(lambda p: Vit(config).apply({"params": p}, pixels, **kwargs))(params)


@pytest.fixture(scope="module")
def params():
    return make_params(Vit(VIT), images())


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_equals_the_numpy_form(params, activation):
    config, pixels = change(VIT, activation=activation), images()
    out = run(config, params, pixels)
    for index, image in enumerate(pixels):
        last, pooled = oracle.vit(oracle.doubles(params), config, image.astype(np.float64))
        np.testing.assert_allclose(out.last_hidden_state[index], last, atol=2e-5)
        np.testing.assert_allclose(out.pooler_output[index], pooled, atol=2e-5)


def test_patches_times_kernel_are_a_strided_convolution():
    pixels = jnp.asarray(images(height=19, width=27))
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 3, 5)), jnp.float32)
    patches, grid = patchify(pixels, 8)
    want = jax.lax.conv_general_dilated(
        pixels, kernel, (8, 8), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert grid == want.shape[1:3] == (2, 3)
    np.testing.assert_allclose(patches @ kernel.reshape(-1, 5), want.reshape(2, 6, 5), atol=1e-4)


@pytest.mark.parametrize("size", [(24, 24), (16, 8), (33, 47)])
def test_other_sizes_equal_a_model_built_with_resized_positions(params, size):
    pixels = images(1, *size)
    config = change(VIT, image_size=size)
    table = resize_positions(params["embeddings"]["position_embedding"], VIT.grid, config.grid)
    resized = {**params, "embeddings": {**params["embeddings"], "position_embedding": table}}
    got, want = run(VIT, params, pixels), run(config, resized, pixels)
    assert got.last_hidden_state.shape[1] == 1 + config.grid[0] * config.grid[1]
    np.testing.assert_allclose(got.last_hidden_state, want.last_hidden_state, atol=1e-5)


def pooled_sum(config):
    return lambda p: jnp.sin(Vit(config).apply({"params": p}, images()).pooler_output).sum()


@pytest.fixture(scope="module")
def gradient(params):
    return jax.jit(jax.grad(pooled_sum(VIT)))(params)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputation_changes_nothing(params, gradient, remat):
    got = jax.jit(jax.grad(pooled_sum(change(VIT, remat=remat))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, gradient)


def test_recomputation_saves_what_its_name_says(params):
    def saved(remat):
        backward = jax.eval_shape(lambda p: jax.vjp(pooled_sum(change(VIT, remat=remat)), p)[1], params)
        return sum(x.size for x in jax.tree.leaves(backward))

    assert saved("full") < saved("dots") < saved("none")


def test_bfloat16_computes_low_and_keeps_norms_and_parameters_high(params):
    config = change(VIT, dtype="bfloat16")
    initial = jax.eval_shape(Vit(config).init, jax.random.key(0), images())
    assert {x.dtype for x in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    low, high = run(config, params, images()), run(VIT, params, images())
    assert low.last_hidden_state.dtype == jnp.bfloat16
    assert low.pooler_output.dtype == jnp.float32
    difference = np.abs(np.asarray(low.pooler_output - high.pooler_output))
    assert 0 < difference.max() < 0.15
    grads = jax.eval_shape(jax.grad(lambda p: run(config, p, images()).pooler_output.sum()), params)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_patch_dropout_draws_per_image_and_keeps_the_class_token():
    tokens = jnp.broadcast_to(jnp.arange(17.0)[None, :, None], (3, 17, 2))
    kept = np.asarray(drop_patches(tokens, 0.75, jax.random.key(0)))[:, :, 0]
    assert kept.shape == (3, 5)
    np.testing.assert_array_equal(kept[:, 0], 0.0)
    rows = [frozenset(row) for row in kept]
    assert all(len(row) == 5 and row <= set(range(17)) for row in rows)
    assert len(set(rows)) == 3
    many = jax.vmap(lambda key: drop_patches(tokens, 0.75, key))(jax.random.split(jax.random.key(1), 500))
    share = [(np.asarray(many) == patch).any((2, 3)).mean() for patch in range(1, 17)]
    np.testing.assert_allclose(share, 0.25, atol=0.06)


def test_patch_dropout_is_for_training_only():
    config = change(VIT, image_size=32, patch_dropout=0.5)
    model, pixels = Vit(config), images(1, 32, 32)

    def tokens(train):
        key = jax.random.key(0)
        out, _ = jax.eval_shape(
            lambda: model.init_with_output({"params": key, "dropout": key}, pixels, train=train)
        )
        return out.last_hidden_state.shape[1]

    assert (tokens(False), tokens(True)) == (17, 1 + config.kept_patches) == (17, 9)


@pytest.mark.parametrize(
    ("shape", "dtype", "match"),
    [
        ((2, 3, 16, 24), np.float32, "channels last"),
        ((16, 24, 3), np.float32, "channels last"),
        ((2, 16, 24, 3), np.uint8, "normalise"),
        ((2, 4, 24, 3), np.float32, "no patch"),
    ],
)
def test_wrong_pixels_are_refused(shape, dtype, match):
    with pytest.raises(UserError, match=match):
        check_pixels(np.zeros(shape, dtype), VIT.patch_size)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("heads", 3),
        ("activation", "gelo"),
        ("dtype", "float8"),
        ("remat", "some"),
        ("patch_size", 17),
        ("depth", 0),
    ]
    + [("patch_dropout", 1.0)],
)
def test_wrong_configs_are_refused(field, value):
    with pytest.raises(RecipeError, match=f"{field}.*{value}"):
        change(VIT, **{field: value})
