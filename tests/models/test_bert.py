"""BERT against the numpy form; token types, padding, dropout, cross-attention's building block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import towers_oracle as oracle
from tiny_models import BERT, IDS, MASK, change, make_params

from vlmjax.errors import RecipeError, UserError
from vlmjax.models.bert import INIT, Bert, BertAttention

TYPES = (IDS > 5).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return make_params(Bert(BERT), IDS)


@pytest.fixture(scope="module")
def apply():
    return jax.jit(lambda p, *inputs: Bert(BERT).apply({"params": p}, *inputs))


def test_equals_the_numpy_form(params, apply):
    out = apply(params, IDS, MASK, TYPES)
    for index in range(len(IDS)):
        last, pooled = oracle.bert(oracle.doubles(params), BERT, IDS[index], MASK[index], TYPES[index])
        np.testing.assert_allclose(out.last_hidden_state[index], last, atol=2e-5)
        np.testing.assert_allclose(out.pooler_output[index], pooled, atol=2e-5)


def test_defaults_are_type_zero_all_kept_positions_from_zero(params, apply):
    positions = np.arange(7, dtype=np.int32)[None]
    want = apply(params, IDS, np.ones_like(MASK), np.zeros_like(IDS), positions)
    got = jax.jit(lambda p: Bert(BERT).apply({"params": p}, IDS))(params)
    np.testing.assert_allclose(got.last_hidden_state, want.last_hidden_state, atol=1e-6)


def test_padding_is_not_seen_but_later_tokens_are(params, apply):
    padded, changed = IDS.copy(), IDS.copy()
    padded[0, 5] = 11
    changed[0, 3] = 11
    base, same, other = (apply(params, ids, MASK, TYPES).pooler_output[0] for ids in (IDS, padded, changed))
    np.testing.assert_array_equal(base, same)
    assert np.abs(base - other).max() > 1e-3


def test_dropout_is_for_training_needs_a_key_and_differs_by_layer(params, apply):
    model = Bert(BERT)
    train = jax.jit(lambda key: model.apply({"params": params}, IDS, MASK, train=True, rngs={"dropout": key}))
    first, again, second = (train(jax.random.key(seed)).pooler_output for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-3
    still = Bert(change(BERT, dropout=0.0))
    got = jax.jit(lambda p: still.apply({"params": p}, IDS, MASK, train=True))(params)
    want = apply(params, IDS, MASK, np.zeros_like(IDS))
    np.testing.assert_allclose(got.pooler_output, want.pooler_output, atol=1e-6)
    with pytest.raises(Exception, match="dropout"):
        model.apply({"params": params}, IDS, MASK, train=True)


def test_gradients_are_finite_for_padded_rows_and_leave_the_padding_word_alone(params):
    mask = MASK.copy()
    mask[0] = 0

    def loss(p):
        out = Bert(BERT).apply({"params": p}, IDS, mask)
        return jnp.sin(out.last_hidden_state).sum() + out.pooler_output.sum()

    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    words = grads["embeddings"]["word_embeddings"]
    np.testing.assert_array_equal(words[BERT.pad_token_id], 0.0)
    assert all(np.abs(words[row]).max() > 0 for row in (1, 2, 3, 48, 49))


def test_attention_takes_another_sequence_as_its_context():
    rng = np.random.default_rng(0)
    x, image = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, 24), (2, 5, 40)))
    block = BertAttention(BERT)

    def look(module, x, image):
        return module(x, *module.keys_values(image), None)

    params = make_params(block, x, image, method=look)
    assert params["self"]["key"]["kernel"].shape == (40, 24)
    out = jax.jit(lambda p: block.apply({"params": p}, x, image, method=look))(params)
    p, allowed = oracle.doubles(params), np.ones((3, 5), bool)
    for index in range(2):
        q = oracle.dense(p["self"]["query"], np.asarray(x[index], np.float64))
        k, v = (
            oracle.dense(p["self"][name], np.asarray(image[index], np.float64)) for name in ("key", "value")
        )
        joined = oracle.dense(p["output"]["dense"], oracle.attend(q, k, v, 3, allowed)) + np.asarray(x[index])
        np.testing.assert_allclose(
            out[index], oracle.norm(p["output"]["LayerNorm"], joined, 1e-12), atol=2e-5
        )


def test_initial_spread():
    kernel = INIT(jax.random.key(0), (200, 200), jnp.float32)
    np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.02)


def test_wrong_use_is_refused(params):
    with pytest.raises(UserError, match="10 tokens.*9 positions"):
        Bert(BERT).apply({"params": params}, np.zeros((1, 10), np.int32))
    with pytest.raises(RecipeError, match=r"dropout is 1\.0"):
        change(BERT, dropout=1.0)
    with pytest.raises(RecipeError, match="type_vocab_size 0"):
        change(BERT, type_vocab_size=0)
