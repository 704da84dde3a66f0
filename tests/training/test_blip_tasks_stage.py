"""BLIP's stages of single tasks: losses written down row by row, micro-batches, and how they begin."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training import tiny
from vlmjax.config import BLIP_SHARDING, validate
from vlmjax.errors import RecipeError
from vlmjax.models.bert import BertConfig
from vlmjax.models.blip_config import BlipConfig, blip_vit
from vlmjax.models.blip_tasks import BlipNlvr, BlipVqa
from vlmjax.sharding.mesh import make_mesh, to_global
from vlmjax.stages.blip_nlvr import BlipStatements
from vlmjax.stages.blip_vqa import BlipAnswers
from vlmjax.training.compile import init_params
from vlmjax.training.state import make_state
from vlmjax.training.step import make_train_step

BATCH, TOKENS, SLOTS, ANSWER, DEC, ENC, SEP = 4, 6, 3, 5, 40, 41, 42
CONFIG = BlipConfig(
    image=dataclasses.replace(blip_vit("base", 16), width=16, depth=1, heads=2, mlp_dim=20, patch_size=8),
    text=BertConfig(
        width=16, depth=2, heads=2, mlp_dim=24, vocab_size=43, max_length=8, type_vocab_size=None, dropout=0.0
    ),
    projection_dim=10, bos_token_id=DEC, enc_token_id=ENC, sep_token_id=SEP,
)  # fmt: skip
KINDS = {"blip_vqa": (BlipVqa(CONFIG), BlipAnswers), "blip_nlvr": (BlipNlvr(CONFIG), BlipStatements)}


@pytest.fixture(autouse=True)
def dtypes_as_optax_mixes_them():
    """optax multiplies its int32 counters with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def texts(rng, shape, length):
    ids, mask = np.zeros((2, *shape, length), np.int32)
    for at in np.ndindex(*shape):
        words = int(rng.integers(1, length - 1))
        ids[at][: words + 2] = [39, *rng.integers(1, 38, words), SEP]
        mask[at][: words + 2] = 1
    return ids, mask


def batch(stage):
    rng = np.random.default_rng(1)
    ids, mask = texts(rng, (BATCH,), TOKENS)
    out = {"input_ids": ids, "attention_mask": mask, "valid": np.array([1, 1, 0, 1], bool)}
    if stage == "blip_nlvr":
        pixels = rng.integers(0, 256, (BATCH, 2, 16, 16, 3)).astype(np.uint8)
        return out | {"pixel_values": pixels, "label": np.array([1, 0, 1, 1], np.int32)}
    answers, answers_mask = texts(rng, (BATCH, SLOTS), ANSWER)
    weights = np.array([[0.6, 0.3, 0.1], [1, 0, 0], [0.5, 0.5, 0], [0.2, 0, 0]], np.float32)
    answers[weights == 0], answers_mask[weights == 0] = 0, 0
    pixels = rng.integers(0, 256, (BATCH, 16, 16, 3)).astype(np.uint8)
    named = {"answer_ids": answers, "answer_mask": answers_mask, "answer_weights": weights}
    return out | named | {"pixel_values": pixels}


def random_params(model):
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(lambda: init_params(model, 0))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)


def recipe(stage, **changes):
    made = {"stage": stage, "batch_size": BATCH, "model__text__max_length": TOKENS, "sharding": BLIP_SHARDING}
    made |= {"data__answers": SLOTS, "data__answer_length": ANSWER}
    return tiny.recipe(**{**made, **changes})


def losses(stage, params, given):
    """(loss, metrics) of the stage itself, nothing dropped."""
    model, kind = KINDS[stage]
    made = kind(recipe(stage), model, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    given = jax.tree.map(jnp.asarray, given)

    def both(params, given):
        return made.head(params, made.encode(params, given, jax.random.key(0)), given, {})

    return jax.jit(both)(params, given)


def seen(values, stage):
    c = recipe(stage).data
    return ((values / np.float32(255) - np.float32(c.mean)) / np.float32(c.std)).astype(np.float32)


def written_down_answers(params, given):
    """Question by question, answer by answer, token by token, through the model's plain call."""
    total, count, right, ask = 0.0, 0, [], jax.jit(KINDS["blip_vqa"][0].apply)
    for row in range(BATCH):
        if not given["valid"][row]:
            continue
        count += 1
        question, mask = (
            given[name][row][given["attention_mask"][row] > 0][None]
            for name in ("input_ids", "attention_mask")
        )
        question = np.concatenate([[[ENC]], question[:, 1:]], axis=1)
        pixels = seen(given["pixel_values"][row : row + 1], "blip_vqa")
        for place in range(SLOTS):
            weight = given["answer_weights"][row, place]
            if not weight:
                continue
            answer = given["answer_ids"][row, place][given["answer_mask"][row, place] > 0]
            answer = np.array([[DEC, *answer[1:]]], np.int32)
            logits = ask({"params": params}, pixels, question, None, answer)[0]
            log_p = jax.nn.log_softmax(logits[:-1])
            at = np.arange(len(log_p))
            smoothed = 0.9 * log_p[at, answer[0, 1:]] + 0.1 * log_p.mean(axis=1)
            total += -weight * float(smoothed.sum())
            if not place:
                right.append(float(np.mean(np.asarray(log_p.argmax(1)) == answer[0, 1:])))
    return total / count, sum(right) / count


def test_answers_as_written_down():
    params = random_params(KINDS["blip_vqa"][0])
    loss, metrics = losses("blip_vqa", params, batch("blip_vqa"))
    wanted, right = written_down_answers(params, batch("blip_vqa"))
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["token_accuracy"], right, rtol=1e-6)


def test_statements_as_written_down():
    given, (model, _) = batch("blip_nlvr"), KINDS["blip_nlvr"]
    params = random_params(model)
    loss, metrics = losses("blip_nlvr", params, given)
    found, right = [], []
    for row in np.flatnonzero(given["valid"]):
        logits = jax.jit(model.apply)(
            {"params": params}, seen(given["pixel_values"][row : row + 1], "blip_nlvr"),
            *(given[name][row : row + 1] for name in ("input_ids", "attention_mask")),
        )[0]  # fmt: skip
        found.append(-float(jax.nn.log_softmax(logits)[given["label"][row]]))
        right.append(int(logits.argmax()) == given["label"][row])
    np.testing.assert_allclose(loss, np.mean(found), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", KINDS)
def test_parts_of_a_batch_and_devices_make_the_same_update(stage):
    model, kind = KINDS[stage]
    found = []
    for micro, devices in ((1, 1), (2, 1), (1, 4)):
        mesh = make_mesh(devices, 1, 1, devices=jax.devices()[:devices])
        made = kind(recipe(stage, micro_batches=micro), model, mesh)
        optimizer = optax.sgd(0.1)
        state = make_state(random_params(model), (), optimizer, False, made.init_extra)
        step = make_train_step(made, optimizer, lambda i: 0.1, mesh, seed=0, micro_batches=micro)
        new, metrics = jax.jit(step)(state, to_global(batch(stage), mesh, BATCH))
        found.append((jax.tree.map(np.asarray, new.params), float(metrics["loss"])))
    for params, loss in found[1:]:
        np.testing.assert_allclose(loss, found[0][1], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, found[0][0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__text_from": "bert"}, "begins with a whole BLIP; set config.init_from"),
        ({"data__cache_decoded": 64}, "config.data.cache_decoded=64 is for pairs"),
        ({"data__answers": 0}, "config.data.answers=0: expected at least 1"),
        ({"data__answer_length": 2}, "config.data.answer_length=2: expected at least 3"),
    ],
)
def test_mistakes_of_a_recipe(changes, message):
    with pytest.raises(RecipeError, match=message):
        validate(recipe("blip_vqa", **changes))
