"""Decoders against transformers: logits, loss and all gradients, padding on both sides, cached or not, both ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import tiny
import torch
import transformers
from compare import close, compiled, gradients

from vlmjax import hub
from vlmjax.hub import llama, opt
from vlmjax.losses.token_cross_entropy import token_cross_entropy
from vlmjax.models.decoder import init_cache, text_positions

TOLERANCE = 2e-5
VOCAB, TOKENS = 61, 11
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROTARY = SMALL | {"intermediate_size": 52, "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CASES = {
    "llama: heads of 14, llama3 rope": (
        transformers.LlamaForCausalLM, transformers.LlamaConfig,
        ROTARY | {"head_dim": 14, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-5},
    ),
    "llama: all biases, tied, linear rope": (
        transformers.LlamaForCausalLM, transformers.LlamaConfig,
        ROTARY | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
                  "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
    ),
    "mistral: a window of 4": (
        transformers.MistralForCausalLM, transformers.MistralConfig,
        ROTARY | {"sliding_window": 4, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen2: tied, one head of keys": (
        transformers.Qwen2ForCausalLM, transformers.Qwen2Config,
        ROTARY | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "opt": (
        transformers.OPTForCausalLM, transformers.OPTConfig,
        SMALL | {"ffn_dim": 52, "max_position_embeddings": 24, "pad_token_id": 1, "bos_token_id": 2},
    ),
    "opt of 350m": (
        transformers.OPTForCausalLM, transformers.OPTConfig,
        SMALL | {"ffn_dim": 52, "max_position_embeddings": 24, "pad_token_id": 1, "bos_token_id": 2,
                 "do_layer_norm_before": False, "word_embed_proj_dim": 28},
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", list(CASES))


@functools.cache
def reference_of(name):
    cls, config, sizes = CASES[name]
    torch.manual_seed(0)
    config = config(**sizes)
    config._attn_implementation = "eager"
    return tiny.redraw(cls(config))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Return a function from a case to our model, its parameters and the folder that transformers wrote."""

    @functools.cache
    def loaded(name):
        folder = tiny.folder_of(reference_of(name), tmp_path_factory.mktemp("decoder"))
        return *hub.load(folder), folder

    return loaded


@functools.cache
def batch(side):
    """Rows of 11, 7 and 3 tokens."""
    ids = np.random.default_rng(3).integers(4, VOCAB, (3, TOKENS)).astype(np.int32)
    mask = (np.arange(TOKENS)[None, :] < np.array([[TOKENS], [7], [3]])).astype(np.int32)
    mask = mask if side == "right" else mask[:, ::-1].copy()
    return {"input_ids": np.where(mask == 1, ids, 1).astype(np.int32), "attention_mask": mask}


def logits_of(model, params, inputs):
    run = compiled(lambda p, inputs: model.apply({"params": p}, **inputs, method="causal_lm"))
    return np.asarray(run(params, inputs))


@EVERY
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits(name, side, load):
    model, params, _ = load(name)
    inputs = batch(side)
    with torch.no_grad():
        expected = reference_of(name)(**tiny.to_torch(inputs)).logits.numpy()
    real = inputs["attention_mask"] == 1
    close(logits_of(model, params, inputs)[real], expected[real], TOLERANCE)


@EVERY
def test_loss_and_every_gradient(name, load):
    model, params, _ = load(name)
    inputs = batch("right")
    labels = np.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    reference = reference_of(name)
    reference.zero_grad()
    expected = reference(**tiny.to_torch(inputs | {"labels": labels})).loss
    expected.backward()
    counted = (labels[:, 1:] >= 0).astype(np.float32)

    def hidden_and_head(model):
        mask = jnp.asarray(inputs["attention_mask"])
        x = model.embed(inputs["input_ids"])
        return model(x, positions=text_positions(mask), segment_ids=mask)[0], model.head_kernel()

    def loss(params):
        hidden, kernel = model.apply({"params": params}, method=hidden_and_head)
        states = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        sums = token_cross_entropy(
            states, kernel, jnp.asarray(labels[:, 1:].ravel()), jnp.asarray(counted.ravel()), chunk=7
        )
        return sums.loss / sums.weight

    value, grads = compiled(jax.value_and_grad(loss))(params)
    close(value, expected, TOLERANCE)
    turned = model.config.rope is not None
    assert gradients(model, grads, reference, turned=turned) == len(list(reference.parameters()))


@EVERY
@pytest.mark.parametrize("side", ["right", "left"])
def test_with_a_cache_it_is_the_same(name, side, load):
    """A part of the prompt, another part, then token by token; padding may stand between a row's tokens."""
    model, params, _ = load(name)
    inputs = batch(side)
    more = np.random.default_rng(4).integers(4, VOCAB, (3, 3)).astype(np.int32)
    ids = np.concatenate([inputs["input_ids"], more], 1)
    mask = np.pad(inputs["attention_mask"], ((0, 0), (0, 3)), constant_values=1)
    # The same texts with all their padding before them.
    order = np.argsort(mask, axis=1, kind="stable")
    whole = {"input_ids": np.take_along_axis(ids, order, 1), "attention_mask": np.sort(mask, axis=1)}
    with torch.no_grad():
        expected = reference_of(name)(**tiny.to_torch(whole)).logits.numpy()

    @compiled
    def step(params, ids, positions, segments, cache):
        def run(model):
            hidden, new = model(model.embed(ids), positions=positions, segment_ids=segments, cache=cache)
            return model.logits(hidden), new

        return model.apply({"params": params}, method=run)

    positions = np.asarray(text_positions(jnp.asarray(mask)))
    cache, found = init_cache(model.config, 3, TOKENS + 5), []
    for start, end in ((0, 5), (5, 10), (10, 11), (11, 12), (12, 13), (13, 14)):
        part = (slice(None), slice(start, end))
        logits, cache = step(params, ids[part], positions[part], mask[part], cache)
        found.append(np.asarray(logits))
    assert int(cache.length) == TOKENS + 3
    real = whole["attention_mask"] == 1
    close(np.concatenate(found, 1)[mask == 1], expected[real], TOLERANCE)


@EVERY
def test_an_exported_folder_is_the_one_that_was_read(name, load, tmp_path):
    """transformers loads it without a word and computes the same; read again, no bit has changed."""
    model, params, _ = load(name)
    hub.save(model, params, tmp_path)
    cls = CASES[name][0]
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    reference = reference_of(name)
    for key, value in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    inputs = tiny.to_torch(batch("right"))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, reference(**inputs).logits)
    again, same = hub.load(tmp_path)
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), same, params))


def test_defaults_are_those_of_transformers():
    for cls, defaults in (
        (transformers.LlamaConfig, llama.LLAMA_DEFAULTS),
        (transformers.MistralConfig, llama.MISTRAL_DEFAULTS),
        (transformers.OPTConfig, opt.DEFAULTS),
    ):
        theirs = cls()
        assert {key: getattr(theirs, key) for key in defaults} == defaults
    theirs = transformers.Qwen2Config()
    wanted = llama.QWEN2_DEFAULTS | {"sliding_window": None}  # it says None where use_sliding_window is False
    assert {key: getattr(theirs, key) for key in wanted} == wanted
