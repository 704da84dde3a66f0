"""CLIP's text tower against the numpy form; what it may see and where it pools."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import towers_oracle as oracle
from tiny_models import IDS, MASK, TEXT, change, make_params

from vlmjax.errors import RecipeError, UserError
from vlmjax.models.text import Text, eos_position


@pytest.fixture(scope="module")
def params():
    return make_params(Text(TEXT), IDS)


@pytest.fixture(scope="module")
def apply():
    """One compiled forward pass, with a mask and positions."""

    def forward(params, ids, mask=None, positions=None):
        mask = np.ones_like(ids) if mask is None else mask
        positions = np.arange(ids.shape[1], dtype=np.int32)[None] if positions is None else positions
        return compiled(params, ids, mask, positions)

    compiled = jax.jit(lambda p, *inputs: Text(TEXT).apply({"params": p}, *inputs))
    return forward


def test_equals_the_numpy_form(params, apply):
    left_padded = MASK.copy()
    left_padded[1, :3] = 0
    for mask in (MASK, left_padded):
        out = apply(params, IDS, mask)
        for index, (ids, kept) in enumerate(zip(IDS, mask, strict=True)):
            last = oracle.text(oracle.doubles(params), TEXT, ids, kept)
            np.testing.assert_allclose(out.last_hidden_state[index], last, atol=2e-5)
            np.testing.assert_allclose(out.pooler_output[index], last[(3, 6, 1)[index]], atol=2e-5)


def test_defaults_are_all_tokens_kept_and_positions_from_zero(params, apply):
    want = apply(params, IDS)
    got = jax.jit(lambda p: Text(TEXT).apply({"params": p}, IDS))(params)
    np.testing.assert_allclose(got.last_hidden_state, want.last_hidden_state, atol=1e-6)


def test_later_tokens_change_nothing_before_them(params, apply):
    changed = IDS.copy()
    changed[:, 4:] = 11
    before, after = apply(params, IDS).last_hidden_state, apply(params, changed).last_hidden_state
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 0.01


def test_position_ids_move_the_positions(params, apply):
    shifted = np.arange(1, 8, dtype=np.int32)[None]
    table = params["embeddings"]["position_embedding"]
    moved = {
        **params,
        "embeddings": {**params["embeddings"], "position_embedding": jnp.roll(table, -1, axis=0)},
    }
    got, want = apply(params, IDS, None, shifted), apply(moved, IDS)
    np.testing.assert_allclose(got.last_hidden_state, want.last_hidden_state, atol=1e-6)


def test_pooling_takes_the_first_end_of_text_token():
    np.testing.assert_array_equal(eos_position(jnp.asarray(IDS), 49), [3, 6, 1])
    np.testing.assert_array_equal(eos_position(jnp.asarray(IDS), 30), [0, 0, 0])


def test_pooling_of_old_configs_takes_the_first_largest_id():
    ids = jnp.asarray([[48, 3, 49, 2, 49], [2, 5, 6, 7, 1]], jnp.int32)
    np.testing.assert_array_equal(eos_position(ids, 2), [2, 3])


def test_padded_rows_give_finite_gradients(params):
    mask = MASK.copy()
    mask[0] = 0

    def loss(p):
        out = Text(TEXT).apply({"params": p}, IDS, mask)
        return jnp.sin(out.last_hidden_state).sum() + out.pooler_output.sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_too_many_tokens_are_refused(params):
    with pytest.raises(UserError, match="10 tokens.*9 positions"):
        Text(TEXT).apply({"params": params}, np.zeros((1, 10), np.int32))


def test_an_id_outside_the_vocabulary_is_not_silent(params, apply):
    ids = IDS.copy()
    ids[1, 0] = TEXT.vocab_size
    assert np.isnan(apply(params, ids).last_hidden_state).any((1, 2)).tolist() == [False, True, False]


def test_wrong_configs_are_refused():
    with pytest.raises(RecipeError, match="multiple of heads 5"):
        change(TEXT, heads=5)
    with pytest.raises(RecipeError, match="vocab_size 0"):
        change(TEXT, vocab_size=0)
