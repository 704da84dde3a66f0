"""Hard negatives of image-text matching: whom they are drawn from and how often; the losses of BLIP by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmjax.losses.matching import LEAST, Negatives, draw_negatives, match_loss
from vlmjax.losses.smoothed import smoothed_cross_entropy

ROWS, WIDTH, DRAWS, SCALE = 6, 5, 20_000, 3.0


def unit(seed, rows=ROWS):
    x = np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def drawn(ids, valid, blocks=1, draws=DRAWS):
    rows = len(valid)
    numbers = [jnp.asarray(some, jnp.uint32) for some in np.reshape(ids, (-1, rows))]
    parts = [jnp.asarray(unit(seed, rows)) for seed in range(4)]
    one = lambda key: draw_negatives(  # noqa: E731
        key, *parts, jnp.float32(SCALE), numbers, jnp.asarray(valid), blocks
    )
    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), draws))


def shares(queries, keys, ids, valid):
    """The probabilities of each candidate for each query, written down."""
    scores = SCALE * queries.astype(np.float64) @ keys.astype(np.float64).T
    out = np.zeros((ROWS, ROWS))
    for i in range(ROWS):
        whole = sum(np.exp(scores[i, j]) for j in range(ROWS) if valid[j])
        for j in range(ROWS):
            if valid[i] and valid[j] and ids[i] != ids[j]:
                out[i, j] = np.exp(scores[i, j]) / whole + LEAST
    return out / np.maximum(out.sum(1, keepdims=True), 1e-12)


def test_negatives_are_drawn_as_often_as_they_are_alike():
    """Chi-square of 20,000 draws; captions that are equal and rows that do not count are never drawn."""
    ids, valid = [4, 7, 4, 9, 1, 2], [True, True, True, True, True, False]
    found = drawn(ids, valid)
    images, texts, image_keys, text_keys = (unit(seed) for seed in range(4))
    for got, queries, keys in ((found.image, texts, image_keys), (found.text, images, text_keys)):
        want = shares(queries, keys, ids, valid)
        for row in range(5):
            counts = np.bincount(np.asarray(got[:, 0, row]), minlength=ROWS)
            impossible = want[row] == 0
            assert impossible[row] and not counts[impossible].any()
            expected = DRAWS * want[row, ~impossible]
            freedom = len(expected) - 1
            square = ((counts[~impossible] - expected) ** 2 / expected).sum()
            assert square < freedom + 5 * np.sqrt(2 * freedom), (row, counts, expected)
    assert np.asarray(found.has_image).all(axis=0).tolist() == [True] * 5 + [False]


def test_neither_caption_nor_image_may_be_the_same():
    found = drawn([[1, 1, 2, 3], [5, 6, 5, 7]], [True] * 4, draws=400)
    for got in (found.image, found.text):
        assert [set(np.asarray(got[:, 0, row]).tolist()) for row in range(4)] == [
            {3},
            {2, 3},
            {1, 3},
            {0, 1, 2},
        ]


def test_a_row_without_another_has_no_negative():
    found = drawn([3, 3, 3, 3], [True] * 4, draws=2)
    assert not found.has_image.any() and not found.has_text.any()
    nobody = drawn([1, 2], [False, False], draws=2)
    assert not nobody.has_text.any() and np.asarray(nobody.image).max() < 2


def test_blocks_draw_among_themselves():
    found = drawn([1, 2, 3, 9, 9, 9], [True] * 6, blocks=2, draws=50)
    assert found.image.shape == (50, 2, 3) and int(found.image.max()) <= 2
    assert np.asarray(found.has_text[0]).tolist() == [True, True, True, False, False, False]
    values = jnp.arange(12).reshape(6, 2)
    some = Negatives(jnp.array([[2, 0, 1], [1, 1, 0]]), found.text[0], found.has_image[0], found.has_text[0])
    assert some.take(values, some.image)[:, 0].tolist() == [4, 0, 2, 8, 8, 6]


def test_the_matching_loss_by_hand():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 3, 2)).astype(np.float32)
    there = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0]], bool)
    total, right = 0.0, 0
    for row, pair in zip(*np.nonzero(there), strict=True):
        label = 1 if pair == 0 else 0
        p = np.exp(logits[row, pair, label]) / np.exp(logits[row, pair]).sum()
        total -= np.log(p)
        right += p > 0.5
    loss, metrics = match_loss(jnp.asarray(logits), jnp.asarray(there))
    np.testing.assert_allclose(loss, total / there.sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["itm_accuracy"], right / there.sum(), rtol=1e-6)
    assert match_loss(jnp.asarray(logits), jnp.zeros((4, 3), bool))[0] == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothing_as_torch_has_it(smoothing):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 5, 7)).astype(np.float32)
    labels = rng.integers(0, 7, (2, 5))
    learned = np.array([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0]], bool)
    theirs = torch.tensor(logits.reshape(-1, 7), requires_grad=True)
    masked = torch.tensor(np.where(learned, labels, -100).reshape(-1))
    want = torch.nn.functional.cross_entropy(theirs, masked, label_smoothing=smoothing)
    want.backward()

    def ours(x):
        return smoothed_cross_entropy(x, jnp.asarray(labels), jnp.asarray(learned), smoothing)

    loss, gradient = jax.value_and_grad(ours)(jnp.asarray(logits))
    np.testing.assert_allclose(loss, want.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient.reshape(-1, 7), theirs.grad.numpy(), atol=1e-7)
    nothing = smoothed_cross_entropy(
        jnp.asarray(logits), jnp.asarray(labels), jnp.zeros((2, 5), bool), smoothing
    )
    assert nothing == 0  # torch says NaN
