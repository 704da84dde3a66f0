"""A generative step against a naive oracle, and what must not change it: micro-batches, meshes, neighbours, NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from training import tiny_vlm

from vlmjax.models.layers import DTYPES
from vlmjax.training.optimizer import make_optimizer

ROWS = tiny_vlm.rows()
BATCH = tiny_vlm.batch_of(ROWS)


@pytest.fixture(autouse=True)
def dtypes_as_optax_mixes_them():
    """optax multiplies its int32 counters with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def moved(batch=BATCH, sizes=tiny_vlm.ONE, **changes):
    """(parameters after a step of plain descent at rate 1, metrics): parameters have moved by the gradient."""
    step, state, mesh = tiny_vlm.start(tiny_vlm.random_params(), sizes, **changes)
    state, metrics = step(state, tiny_vlm.globals_of(batch, mesh))
    return tiny_vlm.host(state.params), jax.device_get(metrics)


@functools.cache
def reference():
    """One device, one batch."""
    with jax.numpy_dtype_promotion("standard"):
        return moved()


def same_gradients(found, wanted, atol):
    """Both trees are parameters after a step; the largest gradients are about 1."""
    before, found, wanted = (
        traverse_util.flatten_dict(tree, sep="/") for tree in (tiny_vlm.random_params(), found, wanted)
    )
    for path in wanted:
        gradient = before[path] - wanted[path]
        np.testing.assert_allclose(before[path] - found[path], gradient, atol=atol, rtol=0, err_msg=path)


@functools.cache
def loss_function():
    return jax.jit(functools.partial(_loss, tiny_vlm.stage_of()))


def _loss(stage, params, batch):
    return stage.head(params, stage.encode(params, batch, jax.random.key(0)), batch, {})


def loss_of(batch, params=None):
    params = tiny_vlm.random_params() if params is None else params
    return jax.device_get(loss_function()(params, jax.tree.map(jnp.asarray, batch)))


def test_loss_is_that_of_each_document_alone():
    """Every conversation by itself, unpacked, all logits written out, sums in float64."""
    model, params = tiny_vlm.model(), tiny_vlm.random_params()
    recipe = tiny_vlm.recipe()
    mean, std = (np.array(recipe.data[name], np.float32) for name in ("mean", "std"))
    run = jax.jit(lambda p, ids, pixels: model.apply({"params": p}, ids, None, pixels, method="causal_lm"))
    loss = weight = right = 0.0
    for ids, learned, pixels in (document for row in ROWS for document in row):
        ids = np.array(
            [ids + [0] * (tiny_vlm.LENGTH - len(ids))], np.int32
        )  # causal: what follows is not seen
        pixels = np.zeros((16, 16, 3), np.uint8) if pixels is None else pixels
        scores = run(params, ids, ((pixels / np.float32(255) - mean) / std)[None, None].astype(np.float32))
        scores = np.asarray(scores[0], np.float64)
        chances = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        for t in range(len(learned) - 1):
            if learned[t + 1]:
                loss, weight = loss - chances[t, ids[0, t + 1]], weight + 1
                right += scores[t].argmax() == ids[0, t + 1]
    value, metrics = loss_of(BATCH)
    np.testing.assert_allclose(value, loss / weight, rtol=1e-6)
    np.testing.assert_allclose(metrics["token_accuracy"], right / weight, rtol=1e-6)
    np.testing.assert_allclose(reference()[1]["loss"], loss / weight, rtol=1e-6)


def test_micro_batches_of_unequal_weight_change_nothing():
    """Rows have 0 to 9 tokens with loss; a mean of the parts' means would be another number."""
    weights = BATCH["target_weights"].sum(1)
    parts = weights.reshape(4, 4)
    assert len(set(weights)) > 3 and len(set(parts.sum(1))) > 1
    params, metrics = moved(micro_batches=4)
    expected, told = reference()
    for name in ("loss", "grad_norm", "token_accuracy"):
        np.testing.assert_allclose(metrics[name], told[name], rtol=1e-6, err_msg=name)
    same_gradients(params, expected, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "micro_batches"),
    [
        ({"data": 8, "fsdp": 1, "tensor": 1}, 1),
        ({"data": 1, "fsdp": 8, "tensor": 1}, 2),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
    ],
)
def test_meshes_change_nothing(sizes, micro_batches):
    params, metrics = moved(sizes=sizes, micro_batches=micro_batches)
    expected, told = reference()
    for name in ("loss", "grad_norm", "token_accuracy"):
        np.testing.assert_allclose(metrics[name], told[name], rtol=2e-6, err_msg=name)
    same_gradients(params, expected, 2e-6)


def test_a_neighbour_is_not_seen():
    """Another first document of a row, words and image, leaves the loss of the second, and of other rows, as it was."""
    place = next(i for i, row in enumerate(ROWS) if len(row) == 2)
    first, second = ROWS[place]
    rng = np.random.default_rng(9)
    ids = [token if token == tiny_vlm.IMAGE else int(rng.integers(6, tiny_vlm.VOCAB)) for token in first[0]]
    assert ids != first[0] and first[2] is not None
    other = [*ROWS[:place], [(ids, first[1], 255 - first[2]), second], *ROWS[place + 1 :]]
    batches = BATCH, tiny_vlm.batch_of(other)
    for batch in batches:
        weights = batch["target_weights"].copy()
        weights[place, : len(ids)] = 0
        batch_of_the_rest = {**batch, "target_weights": weights}
        value, metrics = loss_of(batch_of_the_rest)
        if batch is BATCH:
            expected, told = value, metrics
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(metrics["token_accuracy"], told["token_accuracy"])
    assert abs(loss_of(batches[1])[0] - loss_of(batches[0])[0]) > 1e-3
    # And the order of two documents in a row does not matter.
    swapped = tiny_vlm.batch_of([row[::-1] for row in ROWS])
    np.testing.assert_allclose(loss_of(swapped)[0], loss_of(BATCH)[0], rtol=1e-6)


def test_rows_without_images_do_not_look_at_their_slots():
    """Whatever lies in an unused slot: the loss is the same bit for bit, and no gradient comes from it."""
    used = BATCH["image_valid"]
    assert (~used).any() and (BATCH["image_index"].max(1) < 0).any()
    noise = np.random.default_rng(3).integers(0, 256, BATCH["pixel_values"].shape).astype(np.uint8)
    pixels = np.where(used[..., None, None, None], BATCH["pixel_values"], noise)
    np.testing.assert_array_equal(loss_of({**BATCH, "pixel_values": pixels})[0], loss_of(BATCH)[0])


def test_a_batch_of_texts_alone_trains_the_language_model():
    """Without one image the tower and the bridge get a gradient of exactly zero, and the rest goes on."""
    texts = tiny_vlm.batch_of(
        [[tiny_vlm.document(np.random.default_rng(i), 12, 0) + (None,)] for i in range(16)]
    )
    params, metrics = moved(texts)
    before = tiny_vlm.random_params()
    assert metrics["finite"] and metrics["loss"] > 1
    for part in ("vision_model", "bridge"):
        jax.tree.map(np.testing.assert_array_equal, params[part], before[part])
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()), params["language_model"], before["language_model"]
    )
    assert all(jax.tree.leaves(changed))


def test_a_step_that_is_not_finite_changes_nothing():
    recipe = tiny_vlm.recipe(optimizer__weight_decay=0.1)
    params = tiny_vlm.random_params()
    optimizer = make_optimizer(recipe.optimizer, optax.constant_schedule(1e-2), params)
    step, state, mesh = tiny_vlm.start(params, optimizer=optimizer)
    weights = BATCH["target_weights"].copy()
    weights[0, np.flatnonzero(weights[0])[0]] = np.nan
    after, metrics = step(state, tiny_vlm.globals_of({**BATCH, "target_weights": weights}, mesh))
    assert not metrics["finite"] and int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, tiny_vlm.host(after.params), params)
    moments = [(a, b) for a, b in zip(*map(jax.tree.leaves, (after.opt_state, state.opt_state)), strict=True)]
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in moments if a.ndim)
    again, metrics = step(after, tiny_vlm.globals_of(BATCH, mesh))
    assert metrics["finite"] and np.isfinite(optax.tree.norm(again.params))
    np.testing.assert_allclose(metrics["loss"], reference()[1]["loss"], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_parts_stay_bit_for_bit_and_are_kept_as_they_are_computed(dtype):
    model, params = tiny_vlm.model(dtype), tiny_vlm.random_params()
    frozen = ("vision_model/.*", "language_model/.*")
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    step, state, mesh = tiny_vlm.start(params, optimizer=optimizer, of=model, frozen=frozen)
    assert set(state.params) == {"bridge"} and set(state.frozen) == {"vision_model", "language_model"}
    assert {x.dtype for x in jax.tree.leaves(state.frozen)} == {jnp.dtype(DTYPES[dtype])}
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params))
    before, start, losses = tiny_vlm.host(state.frozen), tiny_vlm.host(state.params), []
    for _ in range(4):
        state, metrics = step(state, tiny_vlm.globals_of(BATCH, mesh))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, tiny_vlm.host(state.frozen), before)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), tiny_vlm.host(state.params), start)
    assert all(jax.tree.leaves(changed))
