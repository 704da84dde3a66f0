"""The decoder without another framework: packing, caches, padding, precision, meshes, memory; values are in parity/."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec

from tests.models import tiny_models
from vlmjax.config import DECODER_SHARDING
from vlmjax.errors import RecipeError, UserError
from vlmjax.models.decoder import Decoder, DecoderConfig, init_cache, text_positions
from vlmjax.models.decoders import DECODERS
from vlmjax.sharding.activations import on_mesh
from vlmjax.sharding.mesh import batch_sharding, make_mesh
from vlmjax.sharding.rules import shardings

LLAMA = DecoderConfig(width=24, depth=3, heads=4, kv_heads=2, head_dim=10, mlp_dim=36, vocab_size=48)
WINDOW = tiny_models.change(LLAMA, window=3, tied=True)
OPT = DecoderConfig(
    width=24, depth=2, heads=4, kv_heads=4, head_dim=6, mlp_dim=36, vocab_size=48, max_length=20, rope=None,
    norm="layer", gated=False, activation="relu", qkv_bias=True, out_bias=True, mlp_bias=True, tied=True,
    pre_norm=False, final_norm=False, embed_dim=10,
)  # fmt: skip
KINDS = pytest.mark.parametrize("config", [LLAMA, WINDOW, OPT], ids=["llama", "window", "opt"])
IDS = np.random.default_rng(0).integers(0, 48, (2, 9)).astype(np.int32)
ONES = {"input_ids": np.zeros((1, 1), np.int32), "method": "causal_lm"}


@functools.cache
def params_of(config):
    shared = tiny_models.change(config, dtype="float32", remat="none")
    return tiny_models.make_params(Decoder(shared), **ONES)


@functools.cache
def run(config):
    """Logits of ids with positions, segments and a cache, and the new cache; compiled once for each config."""

    @jax.jit
    def step(params, ids, positions, segments=None, cache=None):
        def parts(model):
            hidden, new = model(model.embed(ids), positions=positions, segment_ids=segments, cache=cache)
            return model.logits(hidden), new

        return Decoder(config).apply({"params": params}, method=parts)

    return functools.partial(step, params_of(config))


def count(length, batch=2):
    return np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))


@KINDS
def test_packed_documents_are_as_if_alone(config):
    alone = [run(config)(IDS[:1, a:b], count(b - a, 1))[0][0] for a, b in ((0, 4), (4, 9))]
    positions = np.concatenate([count(4), count(5)], axis=1)
    segments = np.repeat([[7, 2]], [4, 5], axis=1).astype(np.int32)
    packed = np.concatenate([segments, segments])
    got, _ = run(config)(IDS, positions, packed)
    np.testing.assert_allclose(got[0], np.concatenate(alone), atol=2e-5)


@KINDS
def test_a_token_sees_what_came_before_it_and_within_the_window(config):
    base, _ = run(config)(IDS, count(9))
    for changed in range(9):
        ids = IDS.copy()
        ids[:, changed] = (ids[:, changed] + 1) % 48
        moved = np.abs(run(config)(ids, count(9))[0] - base).max((0, 2)) > 1e-5
        # Layer after layer a window lets two more tokens through.
        reach = 9 if config.window is None else config.depth * (config.window - 1) + 1
        np.testing.assert_array_equal(moved, [0 <= i - changed < reach for i in range(9)])


@KINDS
def test_a_cache_filled_in_pieces_with_packed_documents(config):
    positions = np.concatenate([count(4), count(5)], axis=1)
    segments = np.repeat([[1, 2], [1, 2]], [4, 5], axis=1).astype(np.int32)
    whole, _ = run(config)(IDS, positions, segments)
    cache, found = init_cache(config, 2, 9), []
    for part in (slice(0, 3), slice(3, 6), slice(6, 9)):
        logits, cache = run(config)(IDS[:, part], positions[:, part], segments[:, part], cache)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, atol=2e-5)
    np.testing.assert_array_equal(cache.segment_ids, segments)
    np.testing.assert_array_equal(cache.positions, positions)
    assert int(cache.length) == 9


def test_too_many_tokens_for_a_cache_do_not_pass():
    cache = init_cache(LLAMA, 2, 4)
    assert np.isfinite(run(LLAMA)(IDS[:, :3], count(3), None, cache)[0]).all()
    _, cache = run(LLAMA)(IDS[:, :3], count(3), None, cache)
    assert np.isnan(run(LLAMA)(IDS[:, :3], count(3) + 3, None, cache)[0]).all()
    with pytest.raises(UserError, match="5 tokens do not fit a cache of 4 slots"):
        run(LLAMA)(IDS[:, :5], count(5), None, cache)


def test_a_cache_in_bfloat16_is_that_of_a_model_in_bfloat16():
    half = tiny_models.change(LLAMA, dtype="bfloat16")
    assert init_cache(half, 1, 3).k.dtype == jnp.bfloat16
    assert init_cache(half, 1, 3, jnp.float32).v.dtype == jnp.float32
    logits, _ = run(half)(IDS, count(9))
    cached, cache = run(half)(IDS, count(9), None, init_cache(half, 2, 12))
    assert logits.dtype == jnp.float32 and cache.k.dtype == jnp.bfloat16
    np.testing.assert_allclose(cached, logits, atol=2e-2)
    np.testing.assert_allclose(logits, run(LLAMA)(IDS, count(9))[0], atol=0.2)


def test_decoding_does_not_copy_the_cache():
    """With the cache given away, a step needs little beside a layer of it."""
    config = tiny_models.change(LLAMA, depth=8)
    params = jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), **ONES))["params"]
    cache = jax.eval_shape(lambda: init_cache(config, 4, 2048))
    token = jax.ShapeDtypeStruct((4, 1), jnp.int32)

    def step(params, ids, positions, cache):
        return Decoder(config).apply(
            {"params": params},
            method=lambda m: m(m.embed(ids), positions=positions, cache=cache),
        )

    compiled = jax.jit(step, donate_argnums=3).lower(params, token, token, cache).compile()
    size = cache.k.size * 4
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * size
    assert memory.temp_size_in_bytes < size  # two layers' keys and values, and scores, of eight layers


@KINDS
def test_padding_gives_finite_gradients_that_it_does_not_change(config):
    mask = np.array([[1] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1]], np.int32)

    @jax.jit
    def grads(params, ids):
        def loss(p):
            scores = Decoder(config).apply({"params": p}, ids, mask, method="causal_lm")
            return jnp.where(mask[..., None] != 0, jnp.sin(scores), 0.0).sum()

        return jax.grad(loss)(params)

    first = grads(params_of(config), IDS)
    other = grads(params_of(config), np.where(mask == 0, 5, IDS).astype(np.int32))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(first))
    for path, x in traverse_util.flatten_dict(first, sep="/").items():
        np.testing.assert_allclose(
            x, traverse_util.flatten_dict(other, sep="/")[path], atol=1e-5 * np.abs(x).max(), err_msg=path
        )


def test_positions_of_padded_texts():
    mask = jnp.asarray([[1, 1, 1, 0], [0, 0, 1, 1]], jnp.int32)
    np.testing.assert_array_equal(text_positions(mask), [[0, 1, 2, 2], [0, 0, 0, 1]])


def test_an_id_or_a_learned_position_outside_its_table_is_not_silent():
    assert np.isnan(run(LLAMA)(np.where(IDS == IDS[0, 0], 48, IDS).astype(np.int32), count(9))[0][0, 0]).all()
    # The last position is 19.
    assert np.isfinite(run(OPT)(IDS, count(9) + 11)[0]).all()
    assert np.isnan(run(OPT)(IDS, count(9) + 12)[0][:, 8]).all()


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputing_changes_nothing(remat):
    def grads(config):
        loss = lambda p: jnp.sin(Decoder(config).apply({"params": p}, IDS, method="causal_lm")).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(params_of(LLAMA))

    got, want = grads(tiny_models.change(LLAMA, remat=remat)), grads(LLAMA)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-5), got, want))


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 1, 4)])
def test_over_a_mesh_numbers_are_those_of_one_device(config, shape):
    """Four devices along tensor share two heads of keys."""
    ids = np.random.default_rng(1).integers(0, 48, (8, 9)).astype(np.int32)
    mesh = make_mesh(*shape)

    def loss(params, ids):
        return jnp.sin(Decoder(config).apply({"params": params}, ids, method="causal_lm")).sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(params_of(config), ids)
    places = shardings(DECODER_SHARDING, params_of(config), mesh)
    step = jax.jit(on_mesh(mesh)(jax.value_and_grad(loss)), out_shardings=(None, places))
    found, cut = step(jax.device_put(params_of(config), places), jax.device_put(ids, batch_sharding(mesh)))
    np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-3)
    for path, want in traverse_util.flatten_dict(grads, sep="/").items():
        got = traverse_util.flatten_dict(cut, sep="/")[path]
        np.testing.assert_allclose(got, want, atol=1e-4 * max(np.abs(want).max(), 0.1), err_msg=path)


@pytest.mark.parametrize("name", list(DECODERS))
def test_every_kernel_and_table_of_a_known_decoder_is_cut(name):
    model = Decoder(DECODERS[name])
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), **ONES))["params"]
    places = shardings(DECODER_SHARDING, params, make_mesh(1, 4, 2))
    for path, place in traverse_util.flatten_dict(places, sep="/").items():
        if path.startswith("layers") and path.endswith("kernel"):
            assert sorted(filter(None, place.spec)) == ["fsdp", "tensor"], path
    assert places["token_embedding"].spec == PartitionSpec("tensor", "fsdp")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
        ({"head_dim": 9}, "head_dim 9 is odd"),
        ({"window": 0}, "window is 0; give a positive number"),
        ({"activation": "silly"}, "activation is 'silly'; choose one of"),
        ({"norm": "batch"}, "norm is 'batch'; choose one of rms, layer"),
        ({"attention": "flash"}, "attention is 'flash'; choose one of xla, cudnn, splash"),
        ({"family": "gpt"}, "family is 'gpt'; choose one of llama"),
        ({"remat": "some"}, "remat is 'some'"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        tiny_models.change(LLAMA, **changes)
