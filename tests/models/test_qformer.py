"""The Q-Former against the numpy form, the truth table of its masks, and who cannot change whom."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import towers_oracle as oracle
from tiny_models import IDS, MASK, change, make_params

from vlmjax.errors import RecipeError, UserError
from vlmjax.models.bert import BertConfig
from vlmjax.models.qformer import MASKS, Qformer, QformerConfig, qformer_mask

# Two whole groups of two layers, and a fifth layer that looks at the image alone.
BERT = BertConfig(24, 5, 3, 40, vocab_size=50, max_length=9, type_vocab_size=None)
CONFIG = QformerConfig(BERT, queries=4)
# Compiled to be run once.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
IMAGE = np.random.default_rng(3).normal(size=(3, 6, 20)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return make_params(Qformer(CONFIG), IMAGE, IDS)


@pytest.fixture(scope="module")
def apply():
    form = compiled(
        lambda p, image, ids, mask, kind: Qformer(CONFIG).apply({"params": p}, image, ids, mask, mask=kind),
        static_argnums=4,
    )
    return lambda p, image=IMAGE, ids=IDS, mask=MASK, kind="bidirectional": form(p, image, ids, mask, kind)


def numpy_form(p, image, ids, kept, kind):
    """States of queries and text of one row, layer by layer."""
    emb = p["embeddings"]
    words = emb["word_embeddings"][ids] + emb["position_embeddings"][: len(ids)]
    x = oracle.norm(emb["LayerNorm"], np.concatenate([p["query_tokens"], words]), 1e-12)
    allowed = np.array(TABLES[kind](4, len(ids)))
    allowed[:, 4:] &= kept[None, :] != 0

    def attended(q, x, keys, allowed):
        own = q["self"]
        parts = oracle.dense(own["query"], x), *(oracle.dense(own[n], keys) for n in ("key", "value"))
        return join(q["output"], oracle.attend(*parts, 3, allowed), x)

    def join(q, inner, x):
        return oracle.norm(q["LayerNorm"], oracle.dense(q["dense"], inner) + x, 1e-12)

    for index in range(5):
        part = p["rest"] if index == 4 else oracle.layer(p["groups"], index // 2)
        q = part[f"layer_{index % 2}"]
        x = attended(q["attention"], x, x, allowed)
        queries, text = x[:4], x[4:]
        if index % 2 == 0:
            queries = attended(q["crossattention"], queries, image, np.ones((4, len(image)), bool))
        else:
            assert "crossattention" not in q
        ends = []
        for name, part in (("_query", queries), ("", text)):
            hidden = oracle.ACTIVATIONS["gelu"](oracle.dense(q[f"intermediate{name}"]["dense"], part))
            ends.append(join(q[f"output{name}"], hidden, part))
        x = np.concatenate(ends)
    return x[:4], x[4:]


def table(q, t, sees):
    """Rows of True and False, entry by entry."""
    return [[bool(sees(i < q, j < q, i, j)) for j in range(q + t)] for i in range(q + t)]


TABLES = {
    "unimodal": lambda q, t: table(q, t, lambda of_query, on_query, i, j: of_query == on_query),
    "causal": lambda q, t: table(
        q, t, lambda of_query, on_query, i, j: on_query or (not of_query and j <= i)
    ),
    "bidirectional": lambda q, t: table(q, t, lambda of_query, on_query, i, j: True),
}


def test_the_truth_table():
    """Two queries, three tokens of which the last is padding in the second row."""
    mask = np.array([[1, 1, 1], [1, 1, 0]], np.int32)
    literal = {
        "unimodal": ["11000", "11000", "00111", "00111", "00111"],
        "causal": ["11000", "11000", "11100", "11110", "11111"],
        "bidirectional": ["11111"] * 5,
    }
    assert set(literal) == set(MASKS)
    for kind, rows in literal.items():
        whole = np.array([[cell == "1" for cell in row] for row in rows])
        found = qformer_mask(kind, 2, mask)
        assert found.shape == (2, 1, 5, 5) and found.dtype == bool
        np.testing.assert_array_equal(found[0, 0], whole, kind)
        np.testing.assert_array_equal(TABLES[kind](2, 3), whole, kind)
        whole[:, 4] = False
        np.testing.assert_array_equal(found[1, 0], whole, kind)


@pytest.mark.parametrize("kind", MASKS)
def test_equals_the_numpy_form(kind, params, apply):
    queries, text = apply(params, kind=kind)
    p = oracle.doubles(params)
    for row in range(3):
        real = MASK[row] == 1
        wanted = numpy_form(p, IMAGE[row].astype(np.float64), IDS[row], MASK[row], kind)
        np.testing.assert_allclose(queries[row], wanted[0], atol=2e-5)
        np.testing.assert_allclose(text[row][real], wanted[1][real], atol=2e-5)


def test_one_pass_is_two_passes(params, apply):
    """Queries alone and the text alone, for ITC; queries alone are those of ITG too."""
    alone, nothing = apply(params, ids=None, mask=None)
    none, text = apply(params, image=None)
    assert nothing is none is None
    queries, joint = apply(params, kind="unimodal")
    np.testing.assert_allclose(queries, alone, atol=1e-5)
    np.testing.assert_allclose(joint[MASK == 1], text[MASK == 1], atol=1e-5)
    np.testing.assert_allclose(apply(params, kind="causal")[0], alone, atol=1e-5)
    assert np.abs(apply(params)[0] - alone).max() > 1e-2


@pytest.mark.parametrize("kind", MASKS)
def test_who_changes_whom(kind, params, apply):
    """A later token, the image, padding: what each of them changes."""
    queries, text = apply(params, kind=kind)
    later = IDS.copy()
    later[:, 3] = 17
    changed, after = apply(params, ids=later, kind=kind)
    assert (np.abs(changed - queries).max() > 1e-3) == (kind == "bidirectional")
    assert (np.abs(after - text)[:, :3].max() > 1e-3) == (kind != "causal")
    assert np.abs(after - text)[:, 3].max() > 1e-2
    seen, told = apply(params, image=IMAGE + 1.0, kind=kind)
    assert np.abs(seen - queries).max() > 1e-2
    assert (np.abs(told - text).max() > 1e-3) == (kind != "unimodal")
    padded = np.where(MASK == 1, IDS, 33)
    same, still = apply(params, ids=padded, kind=kind)
    np.testing.assert_array_equal(queries, same)
    np.testing.assert_array_equal(np.asarray(text)[MASK == 1], np.asarray(still)[MASK == 1])


def test_without_words_nothing_of_a_text_is_there(params, apply):
    mute = Qformer(change(CONFIG, reads_text=False))
    small = make_params(mute, IMAGE)
    assert set(small["embeddings"]) == {"LayerNorm"}
    gone = {"intermediate", "output"}
    assert set(small["rest"]["layer_0"]) == set(params["rest"]["layer_0"]) - gone
    assert gone < set(params["rest"]["layer_0"])
    # The parameters that are left compute what they did.
    half = {**params, "embeddings": {"LayerNorm": params["embeddings"]["LayerNorm"]}}
    queries, _ = compiled(lambda p: mute.apply({"params": p}, IMAGE))(half)
    np.testing.assert_allclose(queries, apply(params, ids=None, mask=None)[0], atol=1e-6)


def test_the_program_does_not_grow_with_depth():
    def size(depth):
        model = Qformer(change(CONFIG, bert=change(BERT, depth=depth)))
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGE, IDS))["params"]
        lowered = jax.jit(lambda p: model.apply({"params": p}, IMAGE, IDS)).lower(params)
        return len(lowered.as_text().splitlines())

    assert size(12) == size(4) < size(5)


def test_dropout_is_for_training(params, apply):
    model = Qformer(CONFIG)
    train = compiled(
        lambda key: model.apply({"params": params}, IMAGE, IDS, MASK, train=True, rngs={"dropout": key})[0]
    )
    first, again, second = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-3
    assert np.abs(first - apply(params)[0]).max() > 1e-3


@pytest.mark.slow
def test_gradients_are_finite_for_a_text_that_is_all_padding(params):
    mask = MASK.copy()
    mask[0] = 0

    def loss(p):
        queries, text = Qformer(CONFIG).apply({"params": p}, IMAGE, IDS, mask)
        return jnp.sin(queries).sum() + jnp.sin(text).sum()

    grads = compiled(jax.grad(loss))(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    np.testing.assert_array_equal(grads["embeddings"]["word_embeddings"][BERT.pad_token_id], 0.0)


def test_wrong_use_is_refused(params):
    with pytest.raises(UserError, match="neither image nor input_ids"):
        Qformer(CONFIG).apply({"params": params})
    with pytest.raises(UserError, match="reads_text=False"):
        Qformer(change(CONFIG, reads_text=False)).apply({"params": params}, IMAGE, IDS)
    with pytest.raises(UserError, match="10 tokens.*9 positions"):
        Qformer(CONFIG).apply({"params": params}, IMAGE, np.zeros((3, 10), np.int32))
    with pytest.raises(RecipeError, match="'both'.*unimodal, causal, bidirectional"):
        qformer_mask("both", 2, MASK)
    with pytest.raises(RecipeError, match="queries is 0"):
        change(CONFIG, queries=0)
    with pytest.raises(RecipeError, match="token types"):
        QformerConfig(change(BERT, type_vocab_size=2))
