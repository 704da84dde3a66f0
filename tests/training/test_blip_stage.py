"""BLIP's pretraining step: each loss against one written down, the ramp, the average, and any number of devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.losses.dense_oracle import info_nce_oracle
from tests.training import tiny
from vlmjax.config import BLIP_SHARDING
from vlmjax.errors import RecipeError
from vlmjax.losses.contrastive import Memory
from vlmjax.losses.matching import draw_negatives
from vlmjax.models.bert import BertConfig
from vlmjax.models.blip import Blip
from vlmjax.models.blip_config import TEMPERATURES, BlipConfig, blip_vit
from vlmjax.models.blip_start import momentum_part
from vlmjax.sharding.mesh import make_mesh, to_global
from vlmjax.stages.blip import BlipPretraining
from vlmjax.training.compile import init_params
from vlmjax.training.state import make_state, merge, state_shardings
from vlmjax.training.step import make_train_step

BATCH, TOKENS, DEC, ENC, SEP = 8, 7, 40, 41, 42
IMAGE = {"width": 12, "depth": 2, "heads": 2, "mlp_dim": 20, "patch_size": 8}
MODEL = Blip(
    BlipConfig(
        image=dataclasses.replace(blip_vit("base", 16), **IMAGE),
        text=BertConfig(
            width=16, depth=2, heads=2, mlp_dim=24, vocab_size=43, max_length=TOKENS, type_vocab_size=None, dropout=0.0
        ),
        projection_dim=10, bos_token_id=DEC, enc_token_id=ENC, sep_token_id=SEP,
    )
)  # fmt: skip
RECIPE = {
    "stage": "blip", "batch_size": BATCH, "model__text__max_length": TOKENS,
    "sharding": BLIP_SHARDING, "loss__momentum": 0.75, "loss__queue": 2 * BATCH,
    "loss__soft_targets": 0.4, "loss__soft_targets_ramp": 4, "loss__itm_negatives": "global",
}  # fmt: skip


@pytest.fixture(autouse=True)
def dtypes_as_optax_mixes_them():
    """optax multiplies its int32 counters with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def batch(seed):
    rng = np.random.default_rng(seed)
    ids, mask = np.zeros((BATCH, TOKENS), np.int32), np.zeros((BATCH, TOKENS), np.int32)
    for row in range(BATCH):
        words = int(rng.integers(2, TOKENS - 1))
        ids[row, : words + 2] = [39, *rng.integers(1, 38, words), SEP]
        mask[row, : words + 2] = 1
    return {
        "pixel_values": rng.integers(0, 256, (BATCH, 16, 16, 3)).astype(np.uint8),
        "input_ids": ids,
        "attention_mask": mask,
        "caption_id": np.array([5, 1, 5, 2, 3, 4, 6, 7], np.uint32),
        "valid": np.array([1, 1, 1, 1, 1, 1, 0, 1], bool),
    }


def random_params():
    """None of them zero or one, so that each counts."""
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(lambda: init_params(MODEL, 0))
    drawn = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)
    return {**drawn, "temp": jnp.float32(0.2)}


def run(shape=(1, 1, 1), steps=3, **changes):
    recipe = tiny.recipe(**{**RECIPE, **changes})
    mesh = make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
    stage, optimizer = BlipPretraining(recipe, MODEL, mesh), optax.sgd(0.05)

    def make():
        return make_state(random_params(), stage.frozen, optimizer, False, stage.init_extra)

    places = state_shardings(jax.eval_shape(make), recipe.sharding, mesh)
    states, told = [jax.jit(make, out_shardings=places)()], []
    step = jax.jit(
        make_train_step(stage, optimizer, lambda i: 0.05, mesh, seed=0), out_shardings=(places, None)
    )
    for i in range(steps):
        state, metrics = step(states[-1], to_global(batch(i), mesh, BATCH))
        states.append(state)
        told.append({name: np.asarray(value) for name, value in metrics.items() if name != "finite_groups"})
    return states, told, stage


@pytest.fixture(scope="module")
def followed():
    with jax.numpy_dtype_promotion("standard"):
        return run()


@functools.partial(jax.jit, static_argnums=1)
def apply(params, method, *arguments):
    return MODEL.apply({"params": params}, *arguments, method=method)


def read(model, states, ids, mask):
    return model.text_model.encode(ids, mask, states)


def written(model, states, ids):
    return model.logits(model.text_model.decode(model.text_model.embed(ids), None, states)[0])


def seen(params, values, stage):
    pixels = (values["pixel_values"] / np.float32(255) - np.float32(stage.mean)) / np.float32(stage.std)
    states = apply(params, "encode_image", pixels.astype(np.float32))
    texts = apply(params, "encode_text", values["input_ids"], values["attention_mask"])
    return states, apply(params, "embed_image", states), apply(params, "embed_text", texts)


def matching(params, values, states, image_of, text_of, rows=None):
    """ITM's loss and accuracy, pair by pair: of each row, its text with another image, its image with another text."""
    losses, right = [], []
    for row in np.flatnonzero(values["valid"]):
        others = (
            ((int(image_of[row]), row, 0), (row, int(text_of[row]), 0)) if rows is None or row in rows else ()
        )
        for image, text, label in ((row, row, 1), *others):
            ids, mask = values["input_ids"][[text]].copy(), values["attention_mask"][[text]]
            ids[0, 0] = ENC
            hidden = apply(params, read, states[image : image + 1], ids, mask)
            logits = np.asarray(hidden[0, 0] @ params["itm_head"]["kernel"] + params["itm_head"]["bias"])
            losses.append(np.log(np.exp(logits).sum()) - logits[label])
            right.append(logits.argmax() == label)
    return np.mean(losses), np.mean(right)


def test_the_losses_are_those_written_down(followed):
    """At the second step: a ramp of a quarter, a queue that holds one batch, an average that lags behind."""
    states, told, stage = followed
    state, values = states[1], batch(1)
    params = merge(state.params, {})
    states_, images, texts = seen(params, values, stage)
    keys = [seen({**params, **momentum}, values, stage)[1:] for momentum in (state.extra["momentum"],)][0]
    old = seen({**params, **states[0].extra["momentum"]}, batch(0), stage)[1:]
    ids = np.arange(BATCH)
    memory = Memory(
        *map(np.asarray, keys),
        *(np.asarray(x)[:, None] for x in old),
        batch(0)["valid"][:, None],
        ids[:, None] + 100,
    )
    scale = 1 / float(params["temp"])
    share = 0.4 * 1 / 4
    assert told[1]["soft_targets"] == pytest.approx(share)
    itc = info_nce_oracle(
        images, texts, scale, valid=values["valid"], memory=memory,
        teacher=(*map(np.asarray, keys), 1 / scale, share),
    )[0]  # fmt: skip
    np.testing.assert_allclose(told[1]["itc_loss"], itc, rtol=2e-5)

    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 1)
    negatives = draw_negatives(
        jax.random.split(rng, 3)[0], images, texts, *map(jnp.asarray, keys), jnp.float32(scale),
        [jnp.asarray(values["caption_id"])], jnp.asarray(values["valid"]), 1,
    )  # fmt: skip
    loss, accuracy = matching(params, values, states_, negatives.image[0], negatives.text[0])
    np.testing.assert_allclose(told[1]["itm_loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(told[1]["itm_accuracy"], accuracy, rtol=1e-6)

    words = []
    for row in np.flatnonzero(values["valid"]):
        count = int(values["attention_mask"][row].sum())
        ids = values["input_ids"][[row], :count].copy()
        ids[0, 0] = DEC
        hidden = apply(params, written, states_[row : row + 1], ids)
        logp = np.asarray(jax.nn.log_softmax(hidden[0]))
        words += [-(0.9 * logp[at, ids[0, at + 1]] + 0.1 * logp[at].mean()) for at in range(count - 1)]
    np.testing.assert_allclose(told[1]["lm_loss"], np.mean(words), rtol=1e-5)
    whole = sum(told[1][name] for name in ("itc_loss", "itm_loss", "lm_loss"))
    np.testing.assert_allclose(told[1]["loss"], whole, rtol=1e-6)


@pytest.mark.slow
def test_negatives_are_as_hard_as_the_recipe_says():
    """Many times the hardness of the paper: other negatives, drawn with so many times the scale."""
    states, (told,), stage = run(steps=1, loss__itm_hardness=40.0)
    params, values = merge(states[0].params, {}), batch(0)
    states_, images, texts = seen(params, values, stage)
    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 1)

    def drawn(hardness):
        return draw_negatives(
            jax.random.split(rng, 3)[0], images, texts, images, texts, jnp.float32(hardness / float(params["temp"])),
            [jnp.asarray(values["caption_id"])], jnp.asarray(values["valid"]), 1,
        )  # fmt: skip

    harder, hard = drawn(40.0), drawn(1.0)
    assert (harder.image != hard.image).any() or (harder.text != hard.text).any()
    loss, accuracy = matching(params, values, states_, harder.image[0], harder.text[0])
    np.testing.assert_allclose(told["itm_loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(told["itm_accuracy"], accuracy, rtol=1e-6)


@pytest.mark.slow
def test_weights_and_the_prompt():
    """A prompt as long as the text leaves nothing to write."""
    weights = {"loss__itc": 0.5, "loss__itm": 0.0, "loss__lm": 2.0}
    _, (told,), _ = run(steps=1, loss__prompt_tokens=TOKENS, **weights)
    assert told["lm_loss"] == 0 and "itm_loss" not in told
    np.testing.assert_allclose(told["loss"], 0.5 * told["itc_loss"], rtol=1e-6)


def test_the_ramp_and_the_average(followed):
    states, told, stage = followed
    assert [float(one["soft_targets"]) for one in told] == pytest.approx([0.0, 0.1, 0.2])
    later = [float(stage.soft_share({"steps": jnp.int32(step)})) for step in (3, 4, 5, 1000)]
    assert later == pytest.approx([0.3, 0.4, 0.4, 0.4])
    average = momentum_part(states[0].params)
    for state in states[1:]:
        average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, average, momentum_part(state.params))
    found = states[-1].extra["momentum"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), average, found)
    assert not any("crossattention" in str(path) for path, _ in jax.tree.leaves_with_path(average))


def test_the_temperature_is_held_within_its_bounds():
    stage = BlipPretraining(tiny.recipe(**RECIPE), MODEL, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    for value, bound in ((-1.0, TEMPERATURES[0]), (9.0, TEMPERATURES[1]), (0.3, 0.3)):
        assert float(stage.project({"temp": jnp.float32(value)})["temp"]) == pytest.approx(bound)
    assert stage.project({"other": 1}) == {"other": 1}


@pytest.mark.slow
def test_without_momentum_a_batch_is_its_own_key():
    changes = dict.fromkeys(("loss__momentum", "loss__soft_targets"), 0.0) | dict.fromkeys(
        ("loss__queue", "loss__soft_targets_ramp"), 0
    )
    states, (told,), stage = run(steps=1, **changes)
    params, values = merge(states[0].params, {}), batch(0)
    _, images, texts = seen(params, values, stage)
    want = info_nce_oracle(images, texts, 1 / float(params["temp"]), valid=values["valid"])[0]
    np.testing.assert_allclose(told["itc_loss"], want, rtol=2e-5)
    assert "soft_targets" not in told and states[0].extra == {}


@pytest.mark.slow
def test_eight_devices_change_nothing(followed):
    _, told, _ = followed
    again, same, _ = run((4, 2, 1))
    for one, other in zip(told, same, strict=True):
        for name in ("itc_loss", "itm_loss", "lm_loss", "grad_norm", "itm_accuracy"):
            np.testing.assert_allclose(other[name], one[name], rtol=2e-5, err_msg=name)
    assert again[-1].extra["rows"]["image_queue"].addressable_shards[0].data.shape == (1, 2, 10)


@pytest.mark.slow
def test_local_negatives_stay_on_their_device():
    """Two rows a device: a row's only other one is its neighbour. The seventh does not count: the last has none."""
    states, (told,), stage = run((4, 1, 1), steps=1, loss__itm_negatives="local")
    assert stage.blocks == 4
    params, values = jax.tree.map(jnp.asarray, jax.device_get(merge(states[0].params, {}))), batch(0)
    states_, _, _ = seen(params, values, stage)
    neighbour = np.arange(BATCH) ^ 1
    loss, accuracy = matching(params, values, states_, neighbour, neighbour, rows=range(6))
    np.testing.assert_allclose(told["itm_loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(told["itm_accuracy"], accuracy, rtol=1e-6)


def test_what_cannot_be():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with pytest.raises(RecipeError, match="config.micro_batches=2: ITM's negatives"):
        BlipPretraining(tiny.recipe(**RECIPE, micro_batches=2), MODEL, mesh)
    eight = make_mesh(8, 1, 1, devices=jax.devices()[:8])
    with pytest.raises(RecipeError, match="leaves one row for each of 8 devices.*itm_negatives='global'"):
        BlipPretraining(tiny.recipe(**RECIPE | {"loss__itm_negatives": "local"}), MODEL, eight)


def test_texts_may_be_shorter_than_the_positions_and_never_longer():
    """The recipe says how long texts are, the model how long they could be."""
    stage = BlipPretraining(
        tiny.recipe(**RECIPE | {"model__text__max_length": 5}),
        MODEL,
        make_mesh(1, 1, 1, devices=jax.devices()[:1]),
    )
    assert stage.batch_shapes()["input_ids"][0] == (5,)


@pytest.mark.slow
def test_images_that_are_equal_are_positives_and_no_negatives():
    """Rows 0 and 3 show one image: each is as right for the other, now and later in the queue."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    recipe = tiny.recipe(**RECIPE | {"loss__positives": "images", "loss__soft_targets": 0.0})
    stage = BlipPretraining(recipe, MODEL, mesh)
    assert stage.batch_shapes()["image_id"] == ((), jnp.uint32)
    values = {**batch(0), "image_id": np.array([9, 1, 2, 9, 3, 4, 5, 6], np.uint32)}
    state = make_state(random_params(), stage.frozen, optax.sgd(0.05), False, stage.init_extra)
    step = jax.jit(make_train_step(stage, optax.sgd(0.05), lambda i: 0.05, mesh, seed=0))
    new, told = step(state, to_global(values, mesh, BATCH))
    np.testing.assert_array_equal(new.extra["rows"]["queue_ids"][:, 0], values["image_id"])
    params = jax.tree.map(jnp.asarray, jax.device_get(merge(state.params, {})))
    _, images, texts = seen(params, values, stage)
    keys = [np.asarray(x) for x in (images, texts)]  # of the average, which begins as the model itself
    scores = np.asarray(images, np.float64) @ keys[1].T / 0.2, np.asarray(texts, np.float64) @ keys[0].T / 0.2
    losses = []
    for one in scores:
        for row in np.flatnonzero(values["valid"]):
            same = np.flatnonzero((values["image_id"] == values["image_id"][row]) & values["valid"])
            log_p = one[row] - np.log(np.exp(one[row][values["valid"]]).sum())
            losses.append(-np.mean(log_p[same]))
    np.testing.assert_allclose(told["itc_loss"], np.mean(losses), rtol=2e-5)
