"""Low-rank adapters: nothing at the start, the gradient of the explicit sum, merged as applied, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import traverse_util
from training import tiny_vlm

from vlmjax.config import VLM_SHARDING, Config
from vlmjax.errors import RecipeError
from vlmjax.models import flops, lora
from vlmjax.models.decoder import Decoder
from vlmjax.models.lora import LoraConfig
from vlmjax.sharding.rules import match_rules
from vlmjax.training.optimizer import make_optimizer

EVERY = r"language_model/.*/(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)/kernel"
CONFIG = LoraConfig(
    rank=3, alpha=6.0, targets=(EVERY, r"vision_model/.*/(fc1|v_proj)/kernel", r"bridge/.*/kernel")
)
BATCH = tiny_vlm.batch_of(tiny_vlm.rows(count=6))


@pytest.fixture(autouse=True)
def dtypes_as_optax_mixes_them():
    """optax multiplies its int32 counters with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def adapted(config=CONFIG, filled=True):
    """Parameters with adapters, whose b are not zero where `filled`."""
    params = tiny_vlm.host(lora.with_adapters(tiny_vlm.random_params(), config, jax.random.key(3)))
    if filled:
        rng = np.random.default_rng(5)
        flat = traverse_util.flatten_dict(params, sep="/")
        drawn = {
            p: rng.normal(size=x.shape).astype(x.dtype) * 0.2 for p, x in flat.items() if p.endswith("/b")
        }
        params = traverse_util.unflatten_dict(flat | drawn, sep="/")
    return params


def forward_of(config=CONFIG):
    """A function from parameters to hidden states of a packed batch with images."""
    model, pixels = tiny_vlm.model(), BATCH["pixel_values"].astype(np.float32) / 255
    kind = {"positions": BATCH["position_ids"], "segment_ids": BATCH["segment_ids"]}

    def run(module):
        embeddings = module.embed(BATCH["input_ids"], pixels, image_index=BATCH["image_index"])
        return module(embeddings, **kind)[0]

    def forward(params):
        with lora.applied(config):
            return nn.apply(run, model)(lora.variables(params))

    return forward


hidden = jax.jit(forward_of())


def explicit(params):
    """W + s a b of every adapted kernel, by hand and in jax, so that a gradient goes through it."""
    flat = traverse_util.flatten_dict(params, sep="/")
    out = {path: x for path, x in flat.items() if not path.startswith("lora/")}
    for path, x in flat.items():
        if path.startswith("lora/") and path.endswith("/a"):
            kernel = path.removeprefix("lora/").removesuffix("/a") + "/kernel"
            out[kernel] = out[kernel] + 2.0 * jnp.matmul(x, flat[path[:-1] + "b"], precision="highest")
    return traverse_util.unflatten_dict(out, sep="/")


@pytest.mark.slow
def test_at_the_start_nothing_is_changed_bit_for_bit():
    """One operation after the other; a compiler may add the same numbers in another order."""
    params = jax.tree.map(jnp.asarray, adapted(filled=False))
    base = {name: value for name, value in params.items() if name != "lora"}
    with jax.disable_jit():
        np.testing.assert_array_equal(forward_of()(params), forward_of()(base))
    assert np.abs(hidden(adapted()) - hidden(params)).max() > 0.1


def test_what_is_drawn():
    """As PEFT draws: a uniform within in^-0.5, b zero; each kernel its own, the same for the same key."""
    flat = traverse_util.flatten_dict(adapted(filled=False)["lora"], sep="/")
    assert len(flat) == 2 * (7 + 2 + 2)
    assert flat["language_model/layers/mlp/down_proj/a"].shape == (2, 32, 3)
    assert flat["language_model/layers/mlp/down_proj/b"].shape == (2, 3, 16)
    assert flat["bridge/linear_1/a"].shape == (16, 3)
    for path, x in flat.items():
        if path.endswith("/b"):
            assert not x.any()
        else:
            bound = x.shape[-2] ** -0.5
            assert 0.8 * bound < np.abs(x).max() <= bound and abs(x.mean()) < 0.3 * bound
    assert (flat["bridge/linear_1/a"] != flat["bridge/linear_2/a"]).all()
    jax.tree.map(np.testing.assert_array_equal, adapted(), adapted())


@functools.cache
def decoder_grads(remat, summed):
    """Loss and gradients of a language model alone, with adapters or with the explicit sum."""
    model = Decoder(tiny_vlm.model(remat=remat).config.text)
    config = dataclasses.replace(CONFIG, targets=(EVERY.removeprefix("language_model/"),))
    params = adapted()
    params = {**params["language_model"], "lora": params["lora"]["language_model"]}
    kind = {"positions": BATCH["position_ids"], "segment_ids": BATCH["segment_ids"]}
    probe = np.random.default_rng(2).normal(size=(6, tiny_vlm.LENGTH, 16)).astype(np.float32)
    probe *= (BATCH["segment_ids"] > 0)[..., None]

    def loss(params):
        with lora.applied(config):
            given = lora.variables(explicit(params) if summed else params)
            embeddings = model.apply(given, BATCH["input_ids"], method="embed")
            return (model.apply(given, embeddings, **kind)[0] * probe).sum()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_values_and_gradients_are_those_of_the_explicit_sum(remat):
    """Under the scan, with and without remat; the gradient of a, b, and of what lies below and beside them."""
    value, grads = decoder_grads(remat, False)
    expected, wanted = decoder_grads("none", True)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    wanted = traverse_util.flatten_dict(wanted, sep="/")
    for path, found in traverse_util.flatten_dict(grads, sep="/").items():
        largest = np.abs(wanted[path]).max()
        assert largest > 1e-2 or path == "lm_head", path
        np.testing.assert_allclose(found, wanted[path], atol=1e-5 * max(largest, 1), err_msg=path)


def test_merged_is_what_was_applied():
    """On the host and on the device, in float32 even where the kernel is not."""
    params = adapted()
    expected = hidden(params)
    for made in (lora.merged(params, 6.0), lora.merged(jax.tree.map(jnp.asarray, params), 6.0)):
        assert "lora" not in made
        np.testing.assert_allclose(hidden(made), expected, atol=1e-5)
    half = jax.tree.map(lambda x: x, params)
    kernel = half["bridge"]["linear_1"]["kernel"].astype(jnp.bfloat16)
    half["bridge"]["linear_1"]["kernel"] = kernel
    made, pair = lora.merged(half, 6.0)["bridge"]["linear_1"]["kernel"], params["lora"]["bridge"]["linear_1"]
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, kernel.astype(np.float32) + 2 * pair["a"] @ pair["b"], atol=1e-6)
    plain = tiny_vlm.random_params()
    assert lora.merged(plain, 6.0) is plain


def test_dropout_is_for_training_alone_and_right_on_average():
    """A dropout of what an adapter reads, not of the kernel's own input."""
    config = LoraConfig(rank=2, alpha=2.0, targets=("kernel",), dropout=0.25)
    rng = np.random.default_rng(0)
    kernel, a, b, x = (rng.normal(size=s).astype(np.float32) for s in ((8, 5), (8, 2), (2, 5), (1, 4, 8)))
    tree = {"params": {"kernel": kernel}, "lora": {"a": a, "b": b}}
    dense = nn.Dense(5, use_bias=False)

    def run(key, train=True):
        with lora.applied(config, train=train):
            return dense.apply(tree, x, rngs={"dropout": key})

    keys = jax.random.split(jax.random.key(0), 4000)
    many = np.asarray(jax.jit(jax.vmap(run))(keys))
    np.testing.assert_allclose(run(keys[0], train=False), x @ kernel + x @ a @ b, atol=1e-5)
    assert np.abs(many[0] - many[1]).max() > 0.1
    error = np.abs(many.mean(0) - (x @ kernel + x @ a @ b)) / (many.std(0) / 4000**0.5)
    assert error.max() < 5  # of the mean's own standard deviations
    dropped = (many - x @ kernel)[:, 0, 0]  # of one token: sums over subsets of its 8 values
    subsets = np.array([[(i >> k) & 1 for k in range(8)] for i in range(256)], np.float32)
    possible = (subsets * x[0, 0] / 0.75) @ a @ b
    distance = np.abs(dropped[:50, None] - possible[None]).max(-1).min(1)
    assert distance.max() < 1e-4


def test_the_step_drops_by_its_own_rng():
    config = LoraConfig(rank=3, alpha=6.0, targets=(EVERY,), dropout=0.5)
    stage = tiny_vlm.stage_of(lora=_group(config))
    params = adapted(config)
    batch = jax.tree.map(jnp.asarray, BATCH)
    encode = jax.jit(stage.encode)
    first, second = (encode(params, batch, jax.random.key(seed))["hidden"] for seed in (0, 1))
    assert np.abs(first - second)[BATCH["segment_ids"] > 0].max() > 0.1


def _group(config):
    return Config(dataclasses.asdict(config))


@pytest.mark.slow
def test_a_step_on_a_mesh_is_that_of_one_device():
    """Plain descent at rate 1: equal adapters after the step are equal gradients. And a and b are cut as told."""
    rows = tiny_vlm.batch_of(tiny_vlm.rows())
    # The bridge's rule cuts its second dimension, so a bridge's b is cut and its a is whole.
    config = LoraConfig(rank=3, alpha=6.0, targets=(EVERY, "bridge/.*/kernel"))
    changes = {"lora": _group(config), "frozen": ("vision_model/.*", "language_model/.*", "bridge/.*")}
    results = []
    for sizes in (tiny_vlm.ONE, {"data": 2, "fsdp": 2, "tensor": 2}):
        step, state, mesh = tiny_vlm.start(tiny_vlm.random_params(), sizes, **changes)
        flat = traverse_util.flatten_dict(state.params["lora"], sep="/")
        placed = {
            path: (*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec))) for path, x in flat.items()
        }
        state = state.replace(params=jax.tree.map(lambda x: x + 0.1, state.params))  # b is zero at the start
        state, metrics = step(state, tiny_vlm.globals_of(rows, mesh))
        results.append((tiny_vlm.host(state.params), float(metrics["loss"])))
    assert set(state.params) == {"lora"}
    layers = "language_model/layers"
    assert placed[f"{layers}/self_attn/q_proj/a"] == (None, "fsdp", None)
    assert placed[f"{layers}/self_attn/q_proj/b"] == (None, None, "tensor")
    assert placed[f"{layers}/mlp/down_proj/a"] == (None, "tensor", None)
    assert placed[f"{layers}/mlp/down_proj/b"] == (None, None, "fsdp")
    assert placed["bridge/linear_1/a"] == (None, None) and placed["bridge/linear_1/b"] == (None, "fsdp")
    (one, loss), (many, same) = results
    np.testing.assert_allclose(same, loss, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), many, one)


def test_the_kernels_of_adapters_are_frozen_and_the_rest_as_the_recipe_says():
    config = LoraConfig(rank=2, targets=(r"language_model/.*/(q_proj|v_proj)/kernel",))
    _, state, _ = tiny_vlm.start(tiny_vlm.random_params(), lora=_group(config), frozen=("vision_model/.*",))
    frozen = traverse_util.flatten_dict(state.frozen, sep="/")
    language = [path for path in frozen if path.startswith("language_model")]
    assert sorted(language) == [
        f"language_model/layers/self_attn/{name}/kernel" for name in ("q_proj", "v_proj")
    ]
    assert set(state.params) == {"lora", "bridge", "language_model"}


def test_no_weight_decay_and_the_bridge_at_its_own_rate():
    """What LLaVA's recipe needs: adapters at the full rate, the bridge at a tenth of it, decay on neither adapter."""
    config = LoraConfig(rank=2, targets=(r"language_model/.*/q_proj/kernel",))
    recipe = tiny_vlm.recipe(
        lora=_group(config),
        optimizer__weight_decay=0.5,
        optimizer__learning_rate_multipliers=(("bridge/.*", 0.1),),
    )
    params = lora.with_adapters(tiny_vlm.random_params(), config, jax.random.key(0))
    params = {name: params[name] for name in ("lora", "bridge")}
    params = jax.tree.map(lambda x: jnp.ones_like(x), params)
    optimizer = make_optimizer(recipe.optimizer, optax.constant_schedule(1.0), params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    pair = updates["lora"]["language_model"]["layers"]["self_attn"]["q_proj"]
    np.testing.assert_allclose(pair["a"], -1.0, rtol=1e-4)
    np.testing.assert_allclose(pair["b"], -1.0, rtol=1e-4)
    np.testing.assert_allclose(updates["bridge"]["linear_1"]["kernel"], -0.15, rtol=1e-4)
    np.testing.assert_allclose(updates["bridge"]["linear_1"]["bias"], -0.1, rtol=1e-4)


def test_placement_without_a_catch_all_and_with_short_rules():
    params = {"bridge": {"linear_1": {"kernel": np.zeros((4, 6)), "bias": np.zeros(6)}}}
    config = LoraConfig(rank=2, targets=("bridge/.*/kernel",))
    params = lora.with_adapters(params, config, jax.random.key(0))
    rules = (("bridge/.*kernel", ("fsdp",)), ("bridge/.*bias", ()))
    found = match_rules(lora.placement(rules, params), params)
    assert found["lora"]["bridge"]["linear_1"] == {"a": ("fsdp", None), "b": (None, None)}
    assert lora.placement(VLM_SHARDING, {"bridge": {}}) == VLM_SHARDING


def test_flops_of_adapters():
    """A frozen language model under adapters: forward, backward to them, and 6 a token for each of their numbers."""
    config = tiny_vlm.model().config
    count = functools.partial(flops.vlm_train_flops, config, 2, length=24, slots=2)
    words = 2 * flops.decoder_flops(config.text, 24)
    assert count(trained=("lora",), adapted={"language_model": 100}) == count() + words + 2 * 24 * 600
    assert (
        count(trained=("lora", "bridge"), adapted={"language_model": 100})
        == count(trained=("bridge",)) + 2 * 24 * 600
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ("language_model/q_proj/kernel",)}, "matches no parameter; it must match the whole path, such as"),
        ({"targets": ("q_proj",)}, "such as language_model/layers/self_attn/q_proj/kernel"),
        ({"targets": (".*/token_embedding",)}, "language_model/token_embedding is no kernel of a projection"),
        ({"targets": (EVERY,), "rank": 9}, r"rank=9 is larger than .*/k_proj/kernel \[2, 16, 8\] itself"),
    ],
)  # fmt: skip
def test_what_is_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        lora.with_adapters(tiny_vlm.random_params(), LoraConfig(**{"rank": 2, **change}), jax.random.key(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora__rank": 4}, "rank=4 without config.lora.targets: name the kernels"),
        ({"lora__rank": -1}, "config.lora.rank=-1: expected at least 0"),
        ({"lora__rank": 2, "lora__targets": ("(",)}, "config.lora.targets: .* is not a regular expression"),
        ({"lora__alpha": 0.0}, "config.lora.alpha=0.0: expected a number above 0"),
        ({"lora__dropout": 1.0}, "config.lora.dropout=1.0: expected a number from 0 to 1"),
        ({"lora__rank": 2, "stage": "contrastive"}, "adapters are for stage='generative'"),
    ],
)
def test_what_a_recipe_may_not_say(changes, message):
    with pytest.raises(RecipeError, match=message):
        tiny_vlm.recipe(**changes)
