"""T5: its tree, who sees whom, the ends of its cache, half precision."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import change, make_params

from vlmjax.errors import RecipeError
from vlmjax.models.t5 import T5, decoder_ids, example_inputs
from vlmjax.models.t5_layers import T5Config

TREES = Path(__file__).parent / "trees"
CONFIG = T5Config(26, 2, 3, 3, 7, 40, vocab_size=50, buckets=8, max_distance=12)
TEXTS = np.random.default_rng(0).integers(2, 50, (2, 9)).astype(np.int32)
KEPT = np.array([[1] * 9, [1] * 5 + [0] * 4], np.int32)
ANSWERS = np.random.default_rng(1).integers(2, 50, (2, 6)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return make_params(T5(CONFIG), **example_inputs(T5(CONFIG)))


@pytest.fixture(scope="module")
def logits():
    return jax.jit(
        lambda params, texts, kept, answers: T5(CONFIG).apply({"params": params}, texts, kept, answers),
        compiler_options={"xla_backend_optimization_level": 0},
    )


def tree(model):
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **example_inputs(model)))["params"]
    flat, _ = jax.tree_util.tree_flatten_with_path(shapes)
    lines = ["/".join(key.key for key in path) + f" {leaf.shape} {leaf.dtype}" for path, leaf in flat]
    return "\n".join(sorted(lines)) + "\n"


def test_parameter_tree_is_the_golden_one():
    """Checkpoints, placement rules and the hub's tables hang on these paths; change the file only with them."""
    assert tree(T5(CONFIG)) == (TREES / "t5.txt").read_text()


def test_who_sees_whom(params, logits):
    base = np.asarray(logits(params, TEXTS, KEPT, ANSWERS))
    padded = np.where(KEPT == 1, TEXTS, 7)
    np.testing.assert_array_equal(base, logits(params, padded, KEPT, ANSWERS))
    later = ANSWERS.copy()
    later[:, 4] = 9
    changed = np.asarray(logits(params, TEXTS, KEPT, later))
    np.testing.assert_array_equal(base[:, :4], changed[:, :4])
    assert np.abs(base - changed)[:, 4].max() > 1e-2
    texts = TEXTS.copy()
    texts[:, 4] = 9
    assert np.abs(base - logits(params, texts, KEPT, ANSWERS)).min(axis=(0, 2)).max() > 1e-4


def test_order_matters_by_distance_alone(params, logits):
    """Tokens in front of a text, unseen, change nothing: no position is counted from the start."""
    base = np.asarray(logits(params, TEXTS, np.ones_like(KEPT), ANSWERS))
    moved = np.pad(TEXTS, [(0, 0), (4, 0)])
    kept = np.pad(np.ones_like(KEPT), [(0, 0), (4, 0)])
    np.testing.assert_allclose(logits(params, moved, kept, ANSWERS), base, atol=1e-4)
    assert (
        np.abs(np.asarray(logits(params, TEXTS[:, ::-1].copy(), np.ones_like(KEPT), ANSWERS)) - base).max()
        > 0.1
    )


def test_labels_are_read_one_later():
    labels = np.array([[5, 6, 1, -100], [7, 1, -100, -100]], np.int32)
    found = decoder_ids(labels, change(CONFIG, decoder_start_token_id=3))
    np.testing.assert_array_equal(found, [[3, 5, 6, 1], [3, 7, 1, 0]])


def test_too_many_tokens_for_a_cache_are_nan(params):
    def write(module):
        states = module.encode(module.embed(TEXTS))
        cache = module.empty_cache(2, 7)
        first, cache = module.decode(module.embed(ANSWERS), None, states, cache=cache)
        return first, module.decode(module.embed(ANSWERS[:, :2]), cache=cache)[0]

    first, beyond = T5(CONFIG).apply({"params": params}, method=write)
    assert np.isfinite(first).all() and np.isnan(beyond).all()


def test_the_stream_of_float16_is_wider(params):
    """What an MLP adds may be beyond 65504, at which float16 ends."""
    large = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 3e4 if "down_proj" in str(path) else x, params
    )
    model = T5(change(CONFIG, dtype="float16"))
    form = {"input_ids": TEXTS, "decoder_input_ids": ANSWERS}
    assert np.isfinite(model.apply({"params": large}, **form)).all()
    states = model.apply({"params": params}, TEXTS, method=lambda m, ids: m.encode(m.embed(ids)))
    assert states.dtype == jnp.float16


def test_wrong_shapes_are_refused():
    for fields, message in (
        ({"decoder_depth": 0}, "decoder_depth is 0"),
        ({"buckets": 6}, "buckets 6"),
        ({"max_distance": 4}, "max_distance 4"),
        ({"activation": "geglu"}, "'geglu'; choose one of gelu"),
    ):
        with pytest.raises(RecipeError, match=message):
            change(CONFIG, **fields)
