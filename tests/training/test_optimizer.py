"""Schedules against formulas written by hand, optimizers against numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import tiny

from vlmjax.errors import RecipeError
from vlmjax.models.bert import BertConfig
from vlmjax.models.clip import Clip, ClipConfig, example_inputs
from vlmjax.models.text import TextConfig
from vlmjax.models.vit import VitConfig
from vlmjax.training.optimizer import make_optimizer, make_schedule
from vlmjax.training.state import split

PEAK = 0.01


@pytest.fixture(autouse=True)
def dtypes_as_optax_mixes_them():
    """optax multiplies its int32 counters with floats; the rest of the tree is tested strictly elsewhere."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def schedule(name, total, warmup=0, cooldown=0):
    options = tiny.recipe(optimizer__schedule=name, optimizer__learning_rate=PEAK).optimizer
    made = make_schedule(options, total, warmup, cooldown)
    return [float(made(jnp.int32(i))) for i in range(total + 1)]


def by_hand(name, i, total, warmup, cooldown):
    if i < warmup:
        rate = i / warmup
    elif name == "cosine":
        rate = (1 + math.cos(math.pi * (i - warmup) / (total - warmup))) / 2
    elif name == "linear":
        rate = (total - i) / (total - warmup)
    elif name == "rsqrt":
        rate = math.sqrt(max(warmup, 1) / max(i, 1 if warmup else i + 1))
    else:
        rate = 1.0
    if name in ("rsqrt", "constant") and cooldown and i > total - cooldown:
        rate *= (total - i) / cooldown
    return PEAK * rate


@pytest.mark.parametrize("name", ["cosine", "linear", "rsqrt", "constant"])
@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 0), (5, 0), (1, 4), (5, 15)])
def test_schedules(name, warmup, cooldown):
    expected = [by_hand(name, i, 20, warmup, cooldown) for i in range(21)]
    np.testing.assert_allclose(schedule(name, 20, warmup, cooldown), expected, rtol=1e-5, atol=1e-9)


def test_a_schedule_inside_a_compiled_step():
    made = make_schedule(tiny.recipe(optimizer__schedule="rsqrt").optimizer, 20, 4, 4)
    np.testing.assert_allclose(jax.jit(made)(jnp.int32(18)), made(18), rtol=1e-6)


def test_warmup_and_cooldown_longer_than_the_run():
    with pytest.raises(RecipeError, match=r"warm-up \(5 steps\) and cool-down \(6\) are longer than the run"):
        schedule("constant", 10, 5, 6)


PARAMS = {
    "tower": {
        "kernel": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
        "bias": np.ones(3, np.float32),
    },
    "logit_scale": np.float32(2.0),
}
GRADS = {
    "tower": {"kernel": np.float32([[3, -2, 1], [0.5, 0, -4]]), "bias": np.float32([1, 2, -3])},
    "logit_scale": np.float32(-0.5),
}


def options(**changes):
    base = {"weight_decay_multipliers": ((r".*bias|logit_scale", 0.0),)} | changes
    return tiny.recipe(**{f"optimizer__{name}": value for name, value in base.items()}).optimizer


def steps(config, gradients, rate=PEAK, params=PARAMS):
    """Parameters after a step with each of `gradients`."""
    params = jax.tree.map(jnp.asarray, params)
    optimizer = make_optimizer(config, optax.constant_schedule(rate), params)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(jax.tree.map(jnp.asarray, gradient), state, params)
        params = optax.apply_updates(params, updates)
    return params


def adamw(x, gradients, rate, decay, b1=0.9, b2=0.98, eps=1e-6):
    m, v, x = np.zeros(np.shape(x)), np.zeros(np.shape(x)), np.float64(x)
    for t, g in enumerate(gradients, 1):
        m = b1 * m + (1 - b1) * np.float64(g)
        v = b2 * v + (1 - b2) * np.float64(g) ** 2
        x = x - rate * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * x)
    return x


def test_adamw_with_multipliers_against_numpy():
    halves = jax.tree.map(lambda g: g * np.float32(0.5) + np.float32(0.1), GRADS)
    config = options(weight_decay=0.3, learning_rate_multipliers=((r"tower/kernel", 0.1), (r"tower/.*", 2.0)))
    found = steps(config, [GRADS, halves])
    for path, rate, decay in (
        (("tower", "kernel"), 0.1 * PEAK, 0.3),
        (("tower", "bias"), 2 * PEAK, 0.0),
        (("logit_scale",), PEAK, 0.0),
    ):
        x, g, h, y = PARAMS, GRADS, halves, found
        for part in path:
            x, g, h, y = x[part], g[part], h[part], y[part]
        np.testing.assert_allclose(y, adamw(x, [g, h], rate, decay), rtol=2e-6, err_msg="/".join(path))


def test_weight_decay_alone_shrinks_by_rate_times_decay():
    zero = jax.tree.map(np.zeros_like, GRADS)
    for name in ("adamw", "lion"):
        found = steps(options(name=name, weight_decay=0.5), [zero])
        np.testing.assert_allclose(
            found["tower"]["kernel"], PARAMS["tower"]["kernel"] * (1 - 0.5 * PEAK), rtol=1e-6
        )
        np.testing.assert_array_equal(found["tower"]["bias"], PARAMS["tower"]["bias"])


def test_clipping_bounds_the_norm_of_all_gradients_together():
    """With eps far above the gradients, Adam's first step is proportional to the gradient: the ratio shows the clip."""
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in jax.tree.leaves(GRADS)))

    def moved(clip):
        found = steps(options(weight_decay=0.0, eps=1e6, clip_norm=clip), [GRADS], rate=1e6)
        return np.asarray(found["tower"]["kernel"]) - PARAMS["tower"]["kernel"]

    whole = moved(0.0)
    np.testing.assert_allclose(whole, -GRADS["tower"]["kernel"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moved(norm / 4), whole / 4, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moved(norm * 4), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])
def test_every_optimizer_finds_the_bottom_of_a_bowl(name):
    rng = np.random.default_rng(0)
    shape = (2, 20, 48) if name == "muon" else (40, 48)
    bottom = {"kernel": rng.normal(size=shape).astype(np.float32), "bias": np.float32([1, -2, 3])}
    params = jax.tree.map(lambda x: jnp.zeros_like(jnp.asarray(x)), bottom)
    config = options(name=name, weight_decay=0.0, b2=0.9, weight_decay_multipliers=())
    optimizer = make_optimizer(config, optax.cosine_decay_schedule(0.1, 200), params)

    def loss(p):
        return sum(
            jnp.square(a - b).sum() for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(bottom), strict=True)
        )

    @jax.jit
    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (found, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, 200)
    assert loss(found) < 1e-3 * loss(params)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(found))
    if name == "adafactor":
        shapes = [tuple(x.shape) for x in jax.tree.leaves(state)]
        assert (40,) in shapes and (48,) in shapes  # factored: a row and a column instead of a second matrix
        assert shapes.count((40, 48)) == 1  # momentum alone


def test_muon_turns_each_layers_matrix_and_leaves_the_rest_to_adam():
    """The first update of a matrix keeps the gradient's singular vectors and levels its singular values.

    Five Newton-Schulz steps leave them within 0.68 to 1.13 (Jordan 2024), here times 0.2 sqrt(larger side).
    """
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 6, 10)), "embedding": rng.normal(size=(6, 10))}
    grads = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in params.items()}
    params = jax.tree.map(np.float32, params)
    config = options(name="muon", weight_decay=0.0, weight_decay_multipliers=())
    optimizer = make_optimizer(config, optax.constant_schedule(PEAK), params)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    for layer in range(3):
        left, _, right = np.linalg.svd(grads["kernel"][layer].astype(np.float64), full_matrices=False)
        turned = left.T @ np.asarray(updates["kernel"][layer], np.float64) @ right.T / (-PEAK * 0.2 * 10**0.5)
        assert (abs(np.diag(turned) - 0.9) < 0.25).all()
        np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-4)
    # Adam with Nesterov's look ahead (Dozat 2016): b1 m / (1 - b1^2) + (1 - b1) g / (1 - b1), m = (1 - b1) g.
    ahead = 0.9 * 0.1 / (1 - 0.9**2) + 1.0
    np.testing.assert_allclose(updates["embedding"], -PEAK * ahead * np.sign(grads["embedding"]), rtol=1e-4)


def towers(text):
    shape = {"width": 8, "depth": 2, "heads": 2, "mlp_dim": 16}
    words = BertConfig(**shape, vocab_size=20, max_length=8)
    if text == "clip":
        words = TextConfig(**shape, vocab_size=20, max_length=8, eos_token_id=19)
    config = ClipConfig(image=VitConfig(**shape, image_size=16, patch_size=8), text=words, projection_dim=8)
    return jax.eval_shape(lambda: Clip(config).init(jax.random.key(0), **example_inputs(config)))["params"]


@pytest.mark.parametrize("text", ["clip", "bert"])
@pytest.mark.parametrize(
    "frozen",
    [
        (),
        ("vision_model/.*",),
        ("text_model/.*",),
        ("vision_model/.*", "text_model/.*", "logit_scale"),
        (".*(/bias|/scale|class_embedding|logit_scale)",),
    ],
)
def test_the_default_decay_fits_every_model_and_every_locked_part(text, frozen):
    """Matrices and embeddings shrink; gains, biases, class embedding and temperature do not (CLIP, section 2.5)."""
    trainable, fixed = split(towers(text), frozen)
    config = tiny.recipe(optimizer__weight_decay=1.0).optimizer
    optimizer = make_optimizer(config, optax.constant_schedule(0.5), trainable, fixed)
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), trainable)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        kept = path[-1].key in ("bias", "scale", "class_embedding", "logit_scale")
        np.testing.assert_allclose(update, np.full(update.shape, 0.0 if kept else -0.5), err_msg=str(path))


def test_a_multiplier_that_matches_nothing_is_named():
    config = options(learning_rate_multipliers=(("towr/.*", 0.1),))
    with pytest.raises(
        RecipeError, match="config.optimizer.learning_rate_multipliers: 'towr/.*' matches no param"
    ):
        make_optimizer(config, optax.constant_schedule(0.1), PARAMS)
