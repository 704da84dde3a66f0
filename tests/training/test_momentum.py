"""The momentum encoder and the queue of a contrastive stage, followed step by step, on one device and on eight."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.losses.dense_oracle import info_nce_oracle
from tests.training import tiny
from vlmjax import config
from vlmjax.errors import RecipeError
from vlmjax.losses.contrastive import Memory, info_nce
from vlmjax.models.clip import Clip, ClipConfig
from vlmjax.models.text import TextConfig
from vlmjax.models.vit import VitConfig
from vlmjax.sharding.mesh import make_mesh, to_global
from vlmjax.stages.contrastive import Contrastive
from vlmjax.training.checkpoint import Checkpoints
from vlmjax.training.compile import init_params
from vlmjax.training.state import make_state, merge, state_shardings
from vlmjax.training.step import make_train_step

BATCH, STEPS, MOMENTUM = 16, 4, 0.75
MODEL = Clip(
    ClipConfig(
        VitConfig(width=8, depth=1, heads=2, mlp_dim=16, image_size=16, patch_size=8),
        TextConfig(
            width=8, depth=1, heads=2, mlp_dim=16, vocab_size=64, max_length=8,
            eos_token_id=63, bos_token_id=62, pad_token_id=63,
        ),
        projection_dim=12,
    )
)  # fmt: skip
RECIPE = {"loss__momentum": MOMENTUM, "loss__queue": 2 * BATCH}


@pytest.fixture(autouse=True)
def dtypes_as_optax_mixes_them():
    """optax multiplies its int32 counters with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def batch(seed):
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


def run(shape=(1, 1, 1), **changes):
    """The states before and after each step, the losses, and the stage."""
    recipe, mesh = (
        tiny.recipe(**{**RECIPE, **changes}),
        make_mesh(*shape, devices=jax.devices()[: np.prod(shape)]),
    )
    stage, optimizer = Contrastive(recipe, MODEL, mesh), optax.sgd(0.5)

    def make():
        return make_state(init_params(MODEL, 0), stage.frozen, optimizer, False, stage.init_extra)

    places = state_shardings(jax.eval_shape(make), recipe.sharding, mesh)
    states = [jax.jit(make, out_shardings=places)()]
    step = make_train_step(stage, optimizer, lambda i: 0.5, mesh, seed=0, micro_batches=recipe.micro_batches)
    step, losses = jax.jit(step, out_shardings=(places, None)), []
    for i in range(STEPS):
        state, metrics = step(states[-1], to_global(batch(i), mesh, BATCH))
        states.append(state)
        losses.append(float(metrics["loss"]))
    return states, losses, stage


@pytest.fixture(scope="module")
def followed():
    with jax.numpy_dtype_promotion("standard"):
        return run()


def features(stage, params, step):
    made = stage.keys(params, jax.tree.map(jnp.asarray, batch(step)))
    return np.asarray(made["image_keys"]), np.asarray(made["text_keys"])


def test_the_average_follows_and_the_queue_holds_the_last_batches(followed):
    states, _, stage = followed
    average = jax.tree.map(np.asarray, states[0].params)
    keys = []
    for i, state in enumerate(states[1:]):
        keys.append(features(stage, merge(states[i].extra["momentum"], {}), i))
        average = jax.tree.map(
            lambda a, p: MOMENTUM * a + (1 - MOMENTUM) * np.asarray(p), average, state.params
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        states[-1].extra["momentum"],
        average,
    )
    rows = jax.tree.map(np.asarray, states[-1].extra["rows"])
    assert states[-1].extra["slot"] == STEPS % 2
    for slot, step in ((0, 2), (1, 3)):  # of four batches the last two are kept, in turn
        np.testing.assert_allclose(rows["image_queue"][:, slot], keys[step][0], atol=1e-6)
        np.testing.assert_allclose(rows["text_queue"][:, slot], keys[step][1], atol=1e-6)
        np.testing.assert_array_equal(rows["queue_valid"][:, slot], batch(step)["valid"])
        np.testing.assert_array_equal(rows["queue_ids"][:, slot], batch(step)["caption_id"])


def test_the_loss_is_that_of_the_batch_against_keys_and_queue(followed):
    """At the second step: the queue holds one batch, its other half does not count."""
    states, losses, stage = followed
    state, second = states[1], batch(1)
    whole = merge(state.params, {})
    made = stage.encode(whole, jax.tree.map(jnp.asarray, second), jax.random.key(0))
    old, new = features(stage, states[0].extra["momentum"], 0), features(stage, state.extra["momentum"], 1)
    memory = Memory(
        *map(jnp.asarray, new),
        *(jnp.asarray(x)[:, None] for x in old),
        queue_valid=jnp.asarray(batch(0)["valid"])[:, None],
        queue_ids=jnp.asarray(batch(0)["caption_id"])[:, None],
    )
    loss, _ = info_nce(
        made["image_embeds"],
        made["text_embeds"],
        jnp.exp(whole["logit_scale"]),
        valid=jnp.asarray(second["valid"]),
        memory=memory,
    )
    np.testing.assert_allclose(losses[1], loss, rtol=1e-5)
    nothing, _ = info_nce(
        made["image_embeds"],
        made["text_embeds"],
        jnp.exp(whole["logit_scale"]),
        valid=jnp.asarray(second["valid"]),
    )
    assert abs(float(nothing) - losses[1]) > 1e-3


@pytest.mark.slow
def test_meshes_and_micro_batches_change_nothing(followed):
    states, losses, _ = followed
    again, same, _ = run((4, 2, 1), micro_batches=2)
    np.testing.assert_allclose(same, losses, rtol=1e-5)
    queue = again[-1].extra["rows"]["image_queue"]
    assert queue.addressable_shards[0].data.shape == (BATCH // 8, 2, 12)
    np.testing.assert_allclose(queue, states[-1].extra["rows"]["image_queue"], atol=1e-5)


def test_soft_targets_are_what_the_average_says():
    """At the first step, without a queue, of captions that stand several times."""
    states, losses, stage = run(loss__soft_targets=0.4, loss__positives="captions", loss__queue=0)
    assert set(states[0].extra) == {"momentum"}
    whole, first = merge(states[0].params, {}), batch(0)
    made = stage.encode(whole, jax.tree.map(jnp.asarray, first), jax.random.key(0))
    keys = features(stage, whole, 0)
    empty = [np.zeros((BATCH, 0, 12), np.float32)] * 2
    memory = Memory(*keys, *empty, np.zeros((BATCH, 0), bool), np.zeros((BATCH, 0), np.uint32))
    scale = np.exp(float(whole["logit_scale"]))
    want = info_nce_oracle(
        made["image_embeds"],
        made["text_embeds"],
        scale,
        ids=first["caption_id"],
        valid=first["valid"],
        memory=memory,
        teacher=(*keys, 1 / scale, 0.4),
    )
    np.testing.assert_allclose(losses[0], want[0], rtol=1e-5)


def test_a_queue_that_cannot_be():
    with pytest.raises(RecipeError, match="config.loss.queue=40 does not hold whole batches.*such as 32"):
        run(loss__queue=40)
    recipe = tiny.recipe(loss__queue=32)
    with pytest.raises(RecipeError, match="config.loss.queue=32 needs a momentum encoder"):
        config.validate(recipe)
    recipe = tiny.recipe(loss__kind="sigmoid", loss__hard_negatives=0.5)
    with pytest.raises(RecipeError, match="belongs to the softmax"):
        config.validate(recipe)


def test_the_sigmoid_has_its_bias_as_parameter():
    recipe = tiny.recipe(loss__kind="sigmoid")
    stage = Contrastive(recipe, MODEL, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    params = stage.with_own_params(init_params(MODEL, 0))
    assert params["logit_bias"] == -10.0
    made = {name: jnp.asarray(value) for name, value in batch(0).items()}
    loss, metrics = stage.head(params, stage.encode(params, made, jax.random.key(0)), made, {})
    assert np.isfinite(loss) and metrics["logit_bias"] == -10.0
    assert "logit_bias" not in Contrastive(tiny.recipe(), MODEL, stage.mesh).with_own_params(params)


@pytest.mark.parametrize("queue", [0, 2 * BATCH])
def test_a_checkpoint_keeps_average_and_queue(tmp_path, queue):
    states, _, _ = run(loss__queue=queue)
    with contextlib.closing(Checkpoints(str(tmp_path))) as checkpoints:
        checkpoints.save(4, states[-1], {"step": 4}, {})
        checkpoints.wait()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states[-1]
        )
        again, _ = checkpoints.restore(4, abstract)
    jax.tree.map(np.testing.assert_array_equal, again, states[-1])


def test_a_checkpoint_from_before_stages_carried_anything_goes_on(tmp_path):
    state = make_state(init_params(MODEL, 0), (), optax.sgd(0.5), False)
    old = {name: getattr(state, name) for name in ("step", "params", "frozen", "opt_state", "ema")}
    with contextlib.closing(Checkpoints(str(tmp_path))) as checkpoints:
        checkpoints.save(1, old, {"step": 1}, {})
        checkpoints.wait()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        again, _ = checkpoints.restore(1, abstract)
    assert again.extra == {}
    jax.tree.map(np.testing.assert_array_equal, again, state)
