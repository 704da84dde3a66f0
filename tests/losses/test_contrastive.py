"""InfoNCE against a float64 oracle that writes every pair down, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlmjax.errors import RecipeError
from vlmjax.losses import choice
from vlmjax.losses.contrastive import Teacher, info_nce
from vlmjax.sharding.mesh import BATCH_AXES, batch_sharding, make_mesh

BATCH, WIDTH = 16, 12
MESHES = {"8x1x1": (8, 1, 1), "2x2x2": (2, 2, 2), "1x1x1": (1, 1, 1), "none": None}


def mesh_of(shape):
    if shape is None:
        return None
    return make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


def embeddings(seed=0, batch=BATCH, width=WIDTH):
    """Two unit-length sets with some agreement between row i of one and row i of the other."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(batch, width))
    sets = [shared + 0.7 * rng.normal(size=(batch, width)) for _ in range(2)]
    return [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in sets]


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def oracle_direction(queries, keys, scale, ids, valid, smoothing, teacher):
    """Loss sum, correct count and gradients of one direction, one query and one key at a time."""
    loss, correct = 0.0, 0
    d_queries, d_keys, d_scale = np.zeros_like(queries), np.zeros_like(keys), 0.0
    used = [j for j in range(len(keys)) if valid[j]]
    for i in used:
        cosines = np.array([queries[i] @ keys[j] for j in used])
        positive = np.array([ids[i] == ids[j] for j in used])
        target = (1 - smoothing) * positive / positive.sum() + smoothing / len(used)
        if teacher is not None:
            teacher_queries, teacher_keys, temperature, weight = teacher
            soft = softmax(np.array([teacher_queries[i] @ teacher_keys[j] for j in used]) / temperature)
            target = weight * soft + (1 - weight) * target
        scores = scale * cosines
        probability = softmax(scores)
        loss -= sum(t * (s - scores.max()) for t, s in zip(target, scores, strict=True))
        loss += np.log(np.exp(scores - scores.max()).sum())
        correct += scores[positive].max() > max(scores[~positive], default=-np.inf)
        for slope, cosine, j in zip(probability - target, cosines, used, strict=True):
            d_queries[i] += slope * scale * keys[j]
            d_keys[j] += slope * scale * queries[i]
            d_scale += slope * cosine
    return loss, correct, d_queries, d_keys, d_scale


def oracle(images, texts, scale, *, ids=None, valid=None, smoothing=0.0, teacher=None):
    """(loss, accuracies, gradients) in float64 numpy, from the definition."""
    images, texts, scale = (np.asarray(x, np.float64) for x in (images, texts, scale))
    ids = np.arange(len(images)) if ids is None else np.asarray(ids)
    valid = np.ones(len(images), bool) if valid is None else np.asarray(valid)
    forth = back = None
    if teacher is not None:
        teacher_images, teacher_texts = (np.asarray(x, np.float64) for x in teacher[:2])
        forth = (teacher_images, teacher_texts, *teacher[2:])
        back = (teacher_texts, teacher_images, *teacher[2:])
    loss_i, correct_i, di_i, dt_i, ds_i = oracle_direction(images, texts, scale, ids, valid, smoothing, forth)
    loss_t, correct_t, dt_t, di_t, ds_t = oracle_direction(texts, images, scale, ids, valid, smoothing, back)
    n = max(valid.sum(), 1)
    gradients = [(di_i + di_t) / (2 * n), (dt_i + dt_t) / (2 * n), (ds_i + ds_t) / (2 * n)]
    return (loss_i + loss_t) / (2 * n), (correct_i / n, correct_t / n), gradients


def ours(images, texts, scale, *, mesh, ids=None, valid=None, smoothing=0.0, teacher=None):
    """(loss, accuracies, gradients) of the code under test, with its inputs laid out as training does."""
    rows = None if mesh is None else batch_sharding(mesh)
    put = (lambda x: jnp.asarray(x)) if mesh is None else (lambda x: jax.device_put(x, rows))
    if teacher is not None:
        teacher = Teacher(put(teacher[0]), put(teacher[1]), *teacher[2:])
    extra = {
        "valid": None if valid is None else put(valid),
        "positive_ids": None if ids is None else put(np.asarray(ids, np.uint32)),
        "teacher": teacher,
    }

    @jax.jit
    def run(images, texts, scale, extra):
        def loss(images, texts, scale):
            return info_nce(images, texts, scale, mesh=mesh, label_smoothing=smoothing, **extra)

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(images, texts, scale)

    (loss, metrics), gradients = run(put(images), put(texts), jnp.float32(scale), extra)
    assert loss.dtype == jnp.float32 and loss.shape == ()
    return loss, (metrics["image_to_text_accuracy"], metrics["text_to_image_accuracy"]), gradients


def assert_same(got, want, tolerance=1e-5):
    """Relative to the loss, and to the largest entry of each gradient."""
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)
    for mine, reference in zip(got[2], want[2], strict=True):
        error = np.abs(np.asarray(mine, np.float64) - reference).max()
        assert error <= tolerance * np.abs(reference).max()


IDS = np.array([7, 1, 7, 2, 3, 1, 4, 5, 7, 6, 2**32 - 1, 8, 9, 2**32 - 1, 10, 11], np.uint32)
VALID = np.array([1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1], bool)
SOFT = (*embeddings(5, width=5), 0.2, 0.4)
CASES = {
    "pairs": {},
    "several positives": {"ids": IDS},
    "invalid rows": {"valid": VALID},
    "smoothing": {"smoothing": 0.1},
    "teacher": {"teacher": SOFT},
    "all of it": {"ids": IDS, "valid": VALID, "smoothing": 0.1, "teacher": SOFT},
}


# Every case on eight devices and on one; what differs between meshes shows in the plainest and the fullest.
PLAINEST_AND_FULLEST = ("pairs", "all of it")


@pytest.mark.parametrize(
    ("shape", "case"),
    [(s, c) for s in MESHES for c in CASES if s in ("8x1x1", "none") or c in PLAINEST_AND_FULLEST],
)
def test_loss_and_gradients_equal_the_oracle(shape, case):
    images, texts = embeddings()
    # Well off the best scale for these embeddings: there its gradient is a difference of equal numbers.
    scale = 8.0
    want = oracle(images, texts, scale, **CASES[case])
    assert_same(ours(images, texts, scale, mesh=mesh_of(MESHES[shape]), **CASES[case]), want)


@pytest.mark.parametrize("shape", ["8x1x1", "none"])
def test_scale_100_keeps_its_digits(shape):
    images, texts = embeddings(1)
    got = ours(images, texts, 100.0, mesh=mesh_of(MESHES[shape]))
    assert_same(got, oracle(images, texts, 100.0), 2e-5)


@pytest.mark.parametrize("shape", ["8x1x1", "none"])
def test_bfloat16_features_are_multiplied_and_summed_in_float32(shape):
    """The inputs are rounded; nothing after them is, but the gradient on its way out."""
    images, texts = (jnp.asarray(x, jnp.bfloat16) for x in embeddings(2))
    got = ours(images, texts, 30.0, mesh=mesh_of(MESHES[shape]))
    want = oracle(images.astype(jnp.float32), texts.astype(jnp.float32), 30.0)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[2][2], want[2][2], rtol=1e-5)
    for mine, reference in zip(got[2][:2], want[2][:2], strict=True):
        assert mine.dtype == jnp.bfloat16
        exact = np.asarray(jnp.asarray(reference, jnp.float32).astype(jnp.bfloat16), np.float64)
        # One unit in the last of bfloat16's 8 bits, where the two roundings fall on different sides.
        assert np.all(np.abs(np.asarray(mine, np.float64) - exact) <= 2.0**-7 * np.abs(exact) + 1e-9)


def test_gradient_does_not_grow_with_the_number_of_devices():
    images, texts = embeddings(3)
    alone = ours(images, texts, 10.0, mesh=mesh_of((1, 1, 1)))[2]
    for shape in [(1, 8, 1), (1, 1, 8)]:
        for mine, reference in zip(ours(images, texts, 10.0, mesh=mesh_of(shape))[2], alone, strict=True):
            np.testing.assert_allclose(mine, reference, rtol=1e-4, atol=1e-7)


def test_through_replicated_parameters_the_gradient_is_that_of_one_device():
    """The way training meets it: a shared weight, gradients summed over devices by the compiler."""
    images, texts = embeddings(4)
    weight = np.eye(WIDTH, dtype=np.float32) + 0.1

    def loss(weight, images, texts, mesh):
        images, texts = images @ weight, texts @ weight
        images = images / jnp.linalg.norm(images, axis=1, keepdims=True)
        texts = texts / jnp.linalg.norm(texts, axis=1, keepdims=True)
        return info_nce(images, texts, jnp.float32(10.0), mesh=mesh)[0]

    one = jax.jit(jax.grad(lambda *a: loss(*a, None)))(weight, images, texts)
    mesh = mesh_of((2, 2, 2))
    put = jax.device_put((images, texts), batch_sharding(mesh))
    many = jax.jit(jax.grad(lambda *a: loss(*a, mesh)))(weight, *put)
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-7)


def test_all_rows_invalid_is_zero_and_so_are_its_gradients():
    images, texts = embeddings()
    for mesh in (None, mesh_of((8, 1, 1))):
        got = ours(images, texts, 100.0, mesh=mesh, valid=np.zeros(BATCH, bool), teacher=SOFT, smoothing=0.1)
        for value in jax.tree.leaves(got):
            np.testing.assert_array_equal(value, np.zeros_like(value))


def test_nan_in_an_invalid_row_stays_there():
    images, texts = embeddings()
    images[2] = texts[7] = np.nan
    clean = [np.where(VALID[:, None], x, 0.0) for x in (images, texts)]
    got = ours(images, texts, 20.0, mesh=mesh_of((8, 1, 1)), valid=VALID)
    assert_same(got, oracle(*clean, 20.0, valid=VALID))
    np.testing.assert_array_equal(got[2][0][~VALID], 0.0)


def test_a_flat_temperature_gives_log_of_the_number_of_keys():
    images, texts = embeddings()
    loss, _, _ = ours(images, texts, 1e-6, mesh=mesh_of((8, 1, 1)))
    np.testing.assert_allclose(loss, np.log(BATCH), rtol=1e-5)
    loss, _, _ = ours(images, texts, 1e-6, mesh=None, valid=VALID)
    np.testing.assert_allclose(loss, np.log(VALID.sum()), rtol=1e-5)


def test_order_of_the_batch_does_not_matter():
    images, texts = embeddings()
    order = np.random.default_rng(0).permutation(BATCH)
    mesh = mesh_of((8, 1, 1))
    one = ours(images, texts, 20.0, mesh=mesh, **CASES["several positives"] | {"valid": VALID})
    two = ours(images[order], texts[order], 20.0, mesh=mesh, ids=IDS[order], valid=VALID[order])
    np.testing.assert_allclose(two[0], one[0], rtol=1e-6)
    np.testing.assert_allclose(two[2][0], np.asarray(one[2][0])[order], rtol=1e-4, atol=1e-6)


def test_ids_that_are_all_different_change_nothing():
    images, texts = embeddings()
    plain = ours(images, texts, 20.0, mesh=None)
    ids = np.random.default_rng(0).permutation(BATCH)
    np.testing.assert_allclose(ours(images, texts, 20.0, mesh=None, ids=ids)[0], plain[0], rtol=1e-6)


def test_repeated_captions_are_not_negatives_only_when_ids_say_so():
    """Rows 0 and 1 carry the same caption: without ids no model can get below log 2 on them."""
    images = np.eye(2, 4, dtype=np.float32)
    texts = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], np.float32) / np.sqrt(np.float32(2))
    blind, accuracy, _ = ours(images, texts, 50.0, mesh=None)
    assert blind > 0.69 and accuracy[0] == 0.0
    _, accuracy, gradients = ours(images, texts, 50.0, mesh=None, ids=[3, 3])
    np.testing.assert_allclose(accuracy, (1.0, 1.0))
    np.testing.assert_allclose(gradients[1], 0.0, atol=1e-5)


def test_teacher_of_weight_zero_is_the_hard_loss_and_gets_no_gradient():
    images, texts = (jnp.asarray(x) for x in embeddings())
    teacher = [jnp.asarray(x) for x in embeddings(9)]
    hard, _ = info_nce(images, texts, jnp.float32(20.0))
    soft, _ = info_nce(images, texts, jnp.float32(20.0), teacher=Teacher(*teacher, 0.1, 0.0))
    np.testing.assert_allclose(soft, hard, rtol=1e-6)

    def loss(teacher_images):
        return info_nce(
            images, texts, jnp.float32(20.0), teacher=Teacher(teacher_images, teacher[1], 0.1, 0.5)
        )[0]

    np.testing.assert_array_equal(jax.grad(loss)(teacher[0]), 0.0)


def test_a_collapsed_model_is_not_called_right():
    same = np.ones((BATCH, 4), np.float32) / 2
    loss, accuracy, _ = ours(same, same, 100.0, mesh=None)
    np.testing.assert_allclose(loss, np.log(BATCH), rtol=1e-6)
    assert accuracy == (0.0, 0.0)


def test_smoothing_out_of_range_is_refused():
    images, texts = (jnp.asarray(x) for x in embeddings())
    with pytest.raises(RecipeError, match="label_smoothing = 1.5"):
        info_nce(images, texts, jnp.float32(1.0), label_smoothing=1.5)


@pytest.mark.parametrize("form", ["gather", "ring", "hierarchical"])
def test_no_device_holds_more_than_a_tile(form, monkeypatch):
    """The square of similarities, and even one device's share of it, would show in the shapes of the program."""
    monkeypatch.setitem(choice.TILES, "cpu", 64)
    batch, width, mesh = 4096, 16, mesh_of((4, 2, 1))
    rows = jax.ShapeDtypeStruct(
        (batch, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    )
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    gradient = jax.grad(lambda *a: info_nce(*a, mesh=mesh, form=form)[0], argnums=(0, 1, 2))
    compiled = jax.jit(gradient).lower(rows, rows, scale).compile()
    assert "[64,64]" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (batch // 8) * batch / 4
