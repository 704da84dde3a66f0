"""Every way of computing the losses over a mesh, tile by tile, against dense oracles in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses.dense_oracle import info_nce_oracle, sigmoid_oracle
from vlmjax.errors import RecipeError
from vlmjax.losses import choice, tpu_kernel
from vlmjax.losses.contrastive import Memory, Teacher, info_nce
from vlmjax.losses.sigmoid import sigmoid
from vlmjax.sharding.mesh import batch_sharding, make_mesh

BATCH, WIDTH = 40, 12
WAYS = [
    ("gather", (2, 2, 2)),
    ("ring", (8, 1, 1)),
    ("ring", (2, 1, 1)),
    ("hierarchical", (2, 2, 2)),
    ("auto", None),
]


def features(seed, batch=BATCH, width=WIDTH):
    """Two unit-length sets with some agreement between row i of one and row i of the other."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(batch, width))
    sets = [shared + 0.7 * rng.normal(size=(batch, width)) for _ in range(2)]
    return [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in sets]


def mesh_of(shape):
    return None if shape is None else make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


RNG = np.random.default_rng(7)
IDS = RNG.integers(0, 25, BATCH).astype(np.uint32)
VALID = RNG.random(BATCH) < 0.8
SOFT = (*features(5, width=5), 0.2, 0.4)
ALL = {"ids": IDS, "valid": VALID, "smoothing": 0.1, "teacher": SOFT, "hardness": 0.3}


def memory_of(slots=2):
    """Momentum keys near the batch's own features, and a queue that is not full yet."""
    keys = [x + 0.1 for x in features(0)]
    unit = [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in keys]
    queue = [x.reshape(BATCH, slots, WIDTH) for x in features(8, BATCH * slots)]
    rng = np.random.default_rng(3)
    return Memory(
        *unit,
        *queue,
        queue_valid=rng.random((BATCH, slots)) < 0.7,
        queue_ids=rng.integers(0, 40, (BATCH, slots)).astype(np.uint32),
    )


def ours(images, texts, scale, mesh, form, *, dtype=np.float32, **case):
    """(loss, accuracies, gradients) of the code under test, laid out as training lays it out."""
    put = jnp.asarray if mesh is None else (lambda x: jax.device_put(x, batch_sharding(mesh)))
    fixed = {
        "valid": None if case.get("valid") is None else put(case["valid"]),
        "positive_ids": None if case.get("ids") is None else put(case["ids"]),
        "teacher": case.get("teacher") and Teacher(*map(put, case["teacher"][:2]), *case["teacher"][2:]),
        "memory": case.get("memory") and jax.tree.map(put, case["memory"]),
    }

    def loss(images, texts, scale, fixed):
        return info_nce(
            images,
            texts,
            scale,
            mesh=mesh,
            form=form,
            feature_dtype=dtype,
            label_smoothing=case.get("smoothing", 0.0),
            hard_negatives=case.get("hardness", 0.0),
            **fixed,
        )

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (value, metrics), gradients = step(put(images), put(texts), jnp.float32(scale), fixed)
    return value, (metrics["image_to_text_accuracy"], metrics["text_to_image_accuracy"]), gradients


def assert_near(got, want, tolerance=1e-5):
    """Relative to the loss, and to the largest entry of each gradient."""
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
    for mine, reference in zip(got[2], want[2], strict=True):
        error = np.abs(np.asarray(mine, np.float64) - reference).max()
        assert error <= tolerance * np.abs(reference).max()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles on every device, none of which its rows divide by."""
    monkeypatch.setitem(choice.TILES, "cpu", 3)


@pytest.mark.parametrize(("form", "shape"), WAYS)
def test_every_way_with_every_option_equals_the_oracle(form, shape):
    images, texts = features(0)
    want = info_nce_oracle(images, texts, 8.0, **ALL)
    assert_near(ours(images, texts, 8.0, mesh_of(shape), form, **ALL), want)


@pytest.mark.parametrize(
    ("form", "shape"), [("ring", (2, 2, 2)), ("ring", (1, 1, 1)), ("hierarchical", (4, 2, 1))]
)
def test_pairs_alone_with_rows_that_do_not_count(form, shape):
    images, texts = features(1)
    want = info_nce_oracle(images, texts, 100.0, valid=VALID)
    assert_near(ours(images, texts, 100.0, mesh_of(shape), form, valid=VALID), want, 2e-5)


@pytest.mark.parametrize("hardness", [0.1, 1.0])
def test_hard_negatives(hardness):
    images, texts = features(2)
    want = info_nce_oracle(images, texts, 5.0, hardness=hardness)
    assert_near(ours(images, texts, 5.0, mesh_of((8, 1, 1)), "ring", hardness=hardness), want)


@pytest.mark.parametrize(
    ("form", "shape", "case"), [(*WAYS[0], "pairs"), (*WAYS[1], "everything"), (*WAYS[4], "everything")]
)
def test_keys_and_queue_of_a_momentum_encoder(form, shape, case):
    """The queue's teacher is what the momentum encoder said: its own features, so the widths are the same."""
    images, texts = features(3)
    memory = memory_of()
    taught = (memory.image_keys, memory.text_keys, 0.2, 0.4)
    options = {"memory": memory, **({} if case == "pairs" else {**ALL, "teacher": taught})}
    want = info_nce_oracle(images, texts, 8.0, **options)
    assert_near(ours(images, texts, 8.0, mesh_of(shape), form, **options), want)


def test_a_momentum_encoder_without_a_queue():
    images, texts = features(3)
    options = {"memory": memory_of(slots=0)}
    want = info_nce_oracle(images, texts, 8.0, **options)
    assert_near(ours(images, texts, 8.0, mesh_of((8, 1, 1)), "ring", **options), want)


def test_a_teacher_of_another_width_has_no_queue():
    images, texts = features(3)
    with pytest.raises(RecipeError, match="width 5, those of the queue 12"):
        ours(images, texts, 8.0, None, "auto", memory=memory_of(), teacher=SOFT)


@pytest.mark.parametrize("form", ["gather", "ring"])
def test_bfloat16_at_scale_100_is_finite_and_as_near_as_its_digits(form):
    images, texts = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in features(4))
    want = info_nce_oracle(images, texts, 100.0)
    got = ours(images, texts, 100.0, mesh_of((8, 1, 1)), form, dtype=jnp.bfloat16)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for mine, reference in zip(got[2], want[2], strict=True):
        assert np.isfinite(mine).all()
        assert np.abs(mine - reference).max() <= 2.0**-7 * np.abs(reference).max()


@pytest.mark.slow
@pytest.mark.parametrize(("form", "case"), [("ring", "pairs"), ("gather", "pairs"), ("ring", "memory")])
def test_the_tpu_kernel_equals_the_oracle(form, case, monkeypatch):
    """Interpreted, on four devices, at scale 100, with rows that do not count, in bfloat16 as it is always used."""
    monkeypatch.setitem(choice.TILES, "cpu", 256)
    monkeypatch.setitem(choice.KERNELS, "cpu", "interpreted")
    monkeypatch.setattr(tpu_kernel, "RESIDENT_BYTES", 512 * 128 * 4)  # gradients in more than one chunk
    batch, mesh, slots = 4 * 600, mesh_of((4, 1, 1)), None
    images, texts = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in features(5, batch, 128))
    options = {"valid": np.random.default_rng(0).random(batch) < 0.9}
    if case == "memory":
        slots, rounded = 1, lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
        keys, queue = (map(rounded, features(seed, batch, 128)) for seed in (6, 7))
        marks = np.ones((batch, 1), bool), np.zeros((batch, 1), np.uint32)
        options["memory"] = Memory(*keys, *(x[:, None] for x in queue), *marks)
    chosen = choice.choose(form, batch, 128, mesh, dtype=jnp.bfloat16, slots=slots)
    assert chosen.kernel == "interpreted" and chosen.form == form
    got = ours(images, texts, 100.0, mesh, form, dtype=jnp.bfloat16, **options)
    monkeypatch.setitem(choice.KERNELS, "cpu", "xla")
    want = ours(images, texts, 100.0, mesh, "gather", dtype=np.float32, **options)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
    for mine, reference in zip(got[2], want[2], strict=True):
        assert np.abs(mine - np.asarray(reference)).max() <= 2.0**-7 * np.abs(reference).max()


@pytest.mark.parametrize(("form", "shape"), WAYS)
def test_sigmoid_equals_the_oracle(form, shape):
    images, texts = features(6)
    mesh = mesh_of(shape)
    put = jnp.asarray if mesh is None else (lambda x: jax.device_put(x, batch_sharding(mesh)))
    ids, valid = put(IDS), put(VALID)

    def loss(images, texts, scale, bias):
        return sigmoid(images, texts, scale, bias, mesh=mesh, form=form, valid=valid, positive_ids=ids)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (value, metrics), gradients = step(put(images), put(texts), jnp.float32(10.0), jnp.float32(-5.0))
    want = sigmoid_oracle(images, texts, 10.0, -5.0, ids=IDS, valid=VALID)
    found = (metrics["image_to_text_accuracy"], metrics["text_to_image_accuracy"])
    assert_near((value, found, gradients), want)


def test_sigmoid_from_bfloat16_features():
    images, texts = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in features(6))
    mesh = mesh_of((8, 1, 1))

    def loss(*args):
        return sigmoid(*args, mesh=mesh, form="ring", feature_dtype=jnp.bfloat16)[0]

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    sides = (jax.device_put(x, batch_sharding(mesh)) for x in (images, texts))
    value, gradients = step(*sides, jnp.float32(10.0), jnp.float32(-5.0))
    want = sigmoid_oracle(images, texts, 10.0, -5.0)
    np.testing.assert_allclose(value, want[0], rtol=1e-5)
    for mine, reference in zip(gradients, want[2], strict=True):
        assert np.abs(mine - reference).max() <= 2.0**-7 * np.abs(reference).max()


def test_auto_gathers_what_is_small_and_sends_round_what_is_not():
    mesh = mesh_of((8, 1, 1))
    assert choice.choose("auto", 1024, 512, mesh).form == "gather"
    large = choice.choose("auto", 4096, 512, mesh)
    assert large.form == "ring" and "ring over data" in large.describe()


def test_forms_that_cannot_be():
    with pytest.raises(RecipeError, match="loss.form = 'rings'"):
        choice.choose("rings", 64, 8, mesh_of((8, 1, 1)))
    with pytest.raises(RecipeError, match="data=8, fsdp=1"):
        choice.choose("hierarchical", 64, 8, mesh_of((8, 1, 1)))
    images, texts = features(0)
    with pytest.raises(RecipeError, match="hard_negatives = -1"):
        info_nce(*map(jnp.asarray, (images, texts)), jnp.float32(1.0), hard_negatives=-1.0)
