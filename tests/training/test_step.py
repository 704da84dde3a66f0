"""One update: the same for any mesh and any number of micro-batches, and none at all when it is not finite."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from training import tiny

from vlmjax.models.clip import Clip, ClipConfig
from vlmjax.models.text import TextConfig
from vlmjax.models.vit import VitConfig
from vlmjax.sharding.mesh import make_mesh, to_global
from vlmjax.stages.contrastive import Contrastive
from vlmjax.stages.stage import Stage
from vlmjax.training.compile import init_params
from vlmjax.training.optimizer import make_optimizer, make_schedule
from vlmjax.training.state import make_state, merge, state_shardings
from vlmjax.training.step import cached_value_and_grad, make_train_step, value_and_grad

BATCH = 32
SHAPE = {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}
MODEL = Clip(
    ClipConfig(
        image=VitConfig(**SHAPE, image_size=16, patch_size=8),
        text=TextConfig(**SHAPE, vocab_size=64, max_length=8, eos_token_id=63),
        projection_dim=16,
    )
)
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.fixture(autouse=True)
def dtypes_as_optax_mixes_them():
    """optax multiplies its int32 counters with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def params():
    """Random parameters on the host, the temperature included."""
    made = jax.tree.map(np.asarray, jax.jit(lambda: init_params(MODEL, 1))())
    return {**made, "logit_scale": np.float32(2.5)}


def batch(seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 62, (BATCH, 8)).astype(np.int32)
    ids[:, 5] = 63
    return {
        "pixel_values": rng.integers(0, 256, (BATCH, 16, 16, 3)).astype(np.uint8),
        "input_ids": ids,
        "attention_mask": np.ones((BATCH, 8), np.int32),
        "caption_id": rng.integers(0, 20, BATCH).astype(np.uint32),
        "valid": rng.random(BATCH) < 0.9,
    }


def state_of(params):
    """A state at step 0 of these parameters alone."""
    return make_state(params, (), optax.sgd(1.0), False)


def mesh_of(sizes):
    devices = jax.devices()[: math.prod(sizes.values())]
    return make_mesh(**sizes, devices=devices)


def run(params, batch, *, sizes=ONE, optimizer=None, ema=0.0, frozen=(), schedule=lambda i: 0.1, **changes):
    """The state after a compiled step, its metrics, and the step; SGD at rate 1 by default."""
    mesh, recipe = mesh_of(sizes), tiny.recipe(**changes)
    stage, optimizer = Contrastive(recipe, MODEL, mesh), optimizer or optax.sgd(1.0)
    frozen = (*frozen, *stage.frozen)

    def make(params):
        return make_state(params, frozen, optimizer, bool(ema))

    places = state_shardings(jax.eval_shape(make, params), recipe.sharding, mesh)
    state = jax.jit(make, out_shardings=places)(params)
    step = make_train_step(
        stage, optimizer, schedule, mesh, seed=0, micro_batches=recipe.micro_batches, ema_decay=ema
    )
    step = jax.jit(step)
    state, metrics = step(state, to_global(batch, mesh, BATCH))
    return state, jax.device_get(metrics), step


@pytest.fixture(scope="module")
def reference(params):
    """One device, one batch."""
    with jax.numpy_dtype_promotion("standard"):
        return run(params, batch(), loss__positives="captions")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "micro_batches"),
    [
        (ONE, 2),
        (ONE, 4),
        ({"data": 8, "fsdp": 1, "tensor": 1}, 1),
        ({"data": 8, "fsdp": 1, "tensor": 1}, 2),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 4),
    ],
)
def test_micro_batches_and_meshes_change_nothing(params, reference, sizes, micro_batches):
    """With SGD at rate 1 the parameters have moved by the gradient: equal parameters are equal gradients."""
    state, metrics, _ = run(
        params, batch(), sizes=sizes, micro_batches=micro_batches, loss__positives="captions"
    )
    expected, told, _ = reference
    for name in ("loss", "grad_norm", "image_to_text_accuracy", "text_to_image_accuracy", "logit_scale"):
        np.testing.assert_allclose(metrics[name], told[name], rtol=1e-5, err_msg=name)
    for path, after in jax.tree_util.tree_leaves_with_path(expected.params):
        before, found = params, state.params
        for key in path:
            before, found = before[key.key], found[key.key]
        gradient, same = before - np.asarray(after), before - np.asarray(found)
        largest = np.abs(gradient).max()
        np.testing.assert_allclose(
            same, gradient, rtol=1e-5, atol=1e-5 * max(largest, 0.1), err_msg=str(path)
        )


def test_micro_batches_hold_every_row_once(params):
    """Features of each micro-batch come back to the rows they belong to, on a mesh as well."""
    mesh = mesh_of({"data": 4, "fsdp": 2, "tensor": 1})
    stage = Contrastive(tiny.recipe(), MODEL, mesh)
    rows = to_global({**batch(), "valid": np.ones(BATCH, bool)}, mesh, BATCH)
    rng = jax.random.key(0)

    class Rows(Stage):
        """The loss weighs each row by its number, so a row out of place shows."""

        def encode(self, p, part, _):
            return {"x": p["w"] * part["input_ids"][:, :1].astype(jnp.float32)}

        def head(self, p, features, whole, extra, rng=None):
            weight = jnp.arange(BATCH, dtype=jnp.float32)[:, None]
            return (weight * features["x"]).sum() + p["w"] * 3.0, {}

    weights = {"w": jnp.float32(2.0)}
    (loss, _), grads = value_and_grad(Rows(), state_of(weights), rows, rng)
    for n in (2, 4):
        step = jax.jit(lambda s, b, n=n: cached_value_and_grad(Rows(), s, b, rng, n, mesh))
        (again, _), more = step(state_of(weights), rows)
        np.testing.assert_allclose(again, loss, rtol=1e-6)
        np.testing.assert_allclose(more["w"], grads["w"], rtol=1e-6)
    assert stage.frozen == ()


@pytest.mark.slow
def test_a_locked_tower_stays_and_a_nan_changes_nothing(params):
    """LiT is one line of a recipe: frozen = ("vision_model/.*",). It has no optimizer state and no average."""
    state, metrics, step = run(
        params, batch(), optimizer=optax.adam(0.01), frozen=("vision_model/.*",), ema=0.9
    )
    assert metrics["finite"]
    assert set(state.frozen) == {"vision_model"} and "vision_model" not in state.params
    jax.tree.map(np.testing.assert_array_equal, state.frozen["vision_model"], params["vision_model"])
    moments = traverse_util.flatten_dict(state.opt_state[0].mu, sep="/")
    assert moments and not any(path.startswith("vision_model") for path in (*moments, *state.ema))
    before, after = (
        tree["text_model"]["encoder"]["layers"]["mlp"]["fc1"]["kernel"] for tree in (params, state.params)
    )
    assert (np.asarray(after) != before).any()
    assert set(merge(state.params, state.frozen)) == set(params)

    kernel = state.params["text_projection"]["kernel"]
    state.params["text_projection"]["kernel"] = kernel.at[0, 0].set(jnp.nan)
    again, metrics = step(state, to_global(batch(1), mesh_of(ONE), BATCH))
    assert not metrics["finite"] and int(again.step) == 2
    jax.tree.map(np.testing.assert_array_equal, again.replace(step=state.step), state)


def test_temperature_learned_capped_and_fixed():
    """An update far beyond 100: learned follows, capped stops at the cap, fixed is no parameter to update."""
    mesh = mesh_of(ONE)
    high = {"logit_scale": jnp.float32(5.1), "w": jnp.ones(2)}
    stages = {
        kind: Contrastive(tiny.recipe(loss__logit_scale=kind), MODEL, mesh)
        for kind in ("learned", "capped", "fixed")
    }
    assert stages["learned"].project(high)["logit_scale"] == jnp.float32(5.1)
    np.testing.assert_allclose(stages["capped"].project(high)["logit_scale"], math.log(100.0), rtol=1e-6)
    assert stages["capped"].project({"w": high["w"]}).keys() == {"w"}  # a locked temperature
    assert stages["learned"].frozen == stages["capped"].frozen == ()
    state = make_state(high, stages["fixed"].frozen, optax.adamw(1.0, weight_decay=1.0), False)
    assert set(state.frozen) == {"logit_scale"} and set(state.params) == {"w"}


@pytest.mark.slow
def test_invalid_rows_reach_neither_loss_nor_gradient(params):
    first = batch()
    other = {name: value.copy() for name, value in first.items()}
    bad = ~first["valid"]
    assert bad.sum() >= 2
    noise = batch(9)
    for name in ("pixel_values", "input_ids", "caption_id"):
        other[name][bad] = noise[name][bad]
    counted = {**other, "valid": np.ones(BATCH, bool)}
    mesh, recipe = mesh_of(ONE), tiny.recipe()
    stage, rng = Contrastive(recipe, MODEL, mesh), jax.random.key(0)
    compiled = jax.jit(lambda p, b: value_and_grad(stage, state_of(p), b, rng))
    ((loss, _), grads), ((same, _), again), ((different, _), _) = (
        compiled(params, to_global(b, mesh, BATCH)) for b in (first, other, counted)
    )
    assert loss == same and abs(different - loss) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), grads, again)


class Halves(Stage):
    """Two groups, of which one can be made infinite by the data."""

    def encode(self, params, batch, rng):
        x = batch["x"]
        return {"good": params["good"]["w"] * x, "bad": jnp.sqrt(params["bad"]["w"] * x)}

    def head(self, params, features, batch, extra, rng=None):
        return features["good"].sum() + features["bad"].sum(), {}


def test_a_step_that_is_not_finite_changes_nothing_and_names_the_group():
    mesh, optimizer = mesh_of(ONE), optax.adam(0.1)
    start = {"good": {"w": jnp.ones(2)}, "bad": {"w": jnp.ones(2)}}
    state = make_state(start, (), optimizer, True)
    step = jax.jit(make_train_step(Halves(), optimizer, lambda i: 0.1, mesh, seed=0, ema_decay=0.9))
    state, metrics = step(state, {"x": jnp.float32([1.0, 2.0])})
    assert metrics["finite"] and all(metrics["finite_groups"].values()) and int(state.step) == 1
    # sqrt at 0: the loss is finite, the gradient of one group is not
    after, metrics = step(state, {"x": jnp.float32([0.0, 2.0])})
    assert np.isfinite(metrics["loss"]) and not metrics["finite"]
    assert {k: bool(v) for k, v in metrics["finite_groups"].items()} == {"good": True, "bad": False}
    jax.tree.map(np.testing.assert_array_equal, after.replace(step=state.step), state)
    after, metrics = step(after, {"x": jnp.float32([np.nan, 2.0])})
    assert not metrics["finite"] and not any(metrics["finite_groups"].values()) and int(after.step) == 3
    jax.tree.map(np.testing.assert_array_equal, after.replace(step=state.step), state)


@pytest.mark.parametrize("bad", [0, 2, 5])
def test_a_skipped_batch_leaves_no_trace_but_the_time(bad):
    """Adam's moments and count know nothing of it; the learning rate is that of the step, as without it."""
    settings = tiny.recipe(optimizer__learning_rate=0.1, optimizer__weight_decay_multipliers=()).optimizer
    schedule = make_schedule(settings, total=8, warmup=2, cooldown=0)
    start = {"w": jnp.float32([1.0, -2.0, 0.5])}
    optimizer = make_optimizer(settings, schedule, start)
    train_step = make_train_step(Line(), optimizer, schedule, mesh_of(ONE), seed=0, ema_decay=0.5)
    step, inputs = jax.jit(train_step), np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    state = oracle = make_state(start, (), optimizer, True)
    for i, x in enumerate(inputs):
        x, rate = jnp.asarray(x), schedule(i)
        state, metrics = step(state, {"x": x * jnp.nan if i == bad else x})
        assert bool(metrics["finite"]) == (i != bad)
        np.testing.assert_allclose(metrics["learning_rate"], rate, rtol=1e-5, atol=1e-7)
        if i == bad:
            schedules = optax.ScaleByScheduleState(oracle.opt_state[-1].count + 1)
            oracle = oracle.replace(step=oracle.step + 1, opt_state=(*oracle.opt_state[:-1], schedules))
        else:
            oracle, expected = step(oracle, {"x": x})
            assert metrics["loss"] == expected["loss"]
    jax.tree.map(np.testing.assert_array_equal, state, oracle)
    assert int(state.opt_state[1].count) == 7 and int(state.opt_state[-1].count) == int(state.step) == 8


class Line(Stage):
    """One parameter, small enough to follow by hand."""

    def encode(self, params, batch, rng):
        return {"y": params["w"] * batch["x"]}

    def head(self, params, features, batch, extra, rng=None):
        return jnp.square(features["y"] - 3.0).sum(), {}


def test_moving_average_and_rates_against_numpy():
    decay, mesh, optimizer = 0.15, mesh_of(ONE), optax.sgd(0.1)
    state = make_state({"w": jnp.float32([1.0])}, (), optimizer, True)
    step = make_train_step(
        Line(), optimizer, lambda i: 0.25 * i.astype(jnp.float32), mesh, seed=0, ema_decay=decay
    )
    step, w, average = jax.jit(step), 1.0, 1.0
    for i, x in enumerate((0.5, 1.5, 1.0, 0.3)):
        state, metrics = step(state, {"x": jnp.float32([x])})
        gradient = 2 * x * (w * x - 3.0)
        np.testing.assert_allclose(metrics["loss"], (w * x - 3.0) ** 2, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], abs(gradient), rtol=1e-5)
        assert metrics["learning_rate"] == 0.25 * i
        w -= 0.1 * gradient
        kept = min(decay, (1 + i) / (10 + i))  # the first steps forget faster
        average = kept * average + (1 - kept) * w
        np.testing.assert_allclose(state.params["w"], [w], rtol=1e-5)
        np.testing.assert_allclose(state.ema["w"], [average], rtol=1e-5)
    assert int(state.step) == 4
