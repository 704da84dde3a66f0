"""Configurations and files of decoders: old and new rope keys, second copies of a tied head, what is refused."""

import dataclasses
import json
import logging

import models
import numpy as np
import pytest
import safetensors.numpy

from vlmjax import hub
from vlmjax.errors import HubError
from vlmjax.hub import llama, opt
from vlmjax.hub.safetensors import FILE
from vlmjax.models.decoder import Decoder
from vlmjax.models.decoders import DECODERS
from vlmjax.ops.rotary import Rope

LLAMA3 = Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)
SCALED = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({}, Rope(1e4)),
        ({"rope_theta": 5e5, "rope_scaling": None}, Rope(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, Rope(1e6)),
        ({"rope_theta": 5e5, "rope_scaling": SCALED | {"rope_type": "llama3"}}, LLAMA3),
        ({"rope_parameters": SCALED | {"rope_type": "llama3", "rope_theta": 5e5}}, LLAMA3),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, Rope(1e4, "linear", 4.0)),
    ],
)  # fmt: skip
def test_rope_is_read_from_the_keys_of_transformers_4_and_5(keys, rope):
    assert llama.to_llama(keys).rope == rope


@pytest.mark.parametrize(
    ("read", "keys", "message"),
    [
        (llama.to_llama, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'; supported"),
        (llama.to_llama, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "without low_freq_factor, high"),
        (llama.to_llama, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (llama.to_llama, {"hidden_act": "silo"}, "hidden_act is 'silo'; nearest supported: silu"),
        (llama.to_mistral, {"layer_types": ["full_attention"]}, "full_attention; only sliding_attention"),
        (llama.to_qwen2, {"use_sliding_window": True, "max_window_layers": 28}, "28 of 32 layers have no"),
        (opt.to_opt, {"enable_bias": False}, "enable_bias is False; only True"),
        (opt.to_opt, {"layer_norm_elementwise_affine": False}, "elementwise_affine is False"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused_with_the_reason(read, keys, message):
    with pytest.raises(HubError, match=message):
        read(keys)


def test_a_qwen2_window_holds_for_all_layers_or_none():
    window = {"use_sliding_window": True, "sliding_window": 9}
    assert llama.to_qwen2(window | {"max_window_layers": 0}).window == 9
    assert llama.to_qwen2(window | {"max_window_layers": 32}).window is None
    assert llama.to_qwen2({"sliding_window": 9}).window is None


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("LlamaForCausalLM", {"window": 4}, "LlamaForCausalLM has window None only; the model has 4"),
        ("LlamaForCausalLM", {"out_bias": True}, "out_bias False only"),
        ("LlamaForCausalLM", {"width": 18}, "multiple of heads, not 18 and 4"),
        ("LlamaForCausalLM", {"rope": None}, "has rotary positions"),
        ("MistralForCausalLM", {"mlp_bias": True}, "mlp_bias False only"),
        ("Qwen2ForCausalLM", {"qkv_bias": False}, "qkv_bias True only"),
        ("Qwen2ForCausalLM", {"norm": "layer"}, "norm 'rms' only"),
        ("OPTForCausalLM", {"window": 4}, "window None only"),
        ("OPTForCausalLM", {"head_dim": 6}, "head_dim 4 only"),
        ("OPTForCausalLM", {"embed_dim": 12}, "embed_dim of another width"),
    ],
)
def test_models_that_a_class_cannot_express_are_refused(model, change, message, tmp_path):
    changed = Decoder(dataclasses.replace(models.MODELS[model].config, **change))
    with pytest.raises(HubError, match=message):
        hub.save(changed, {}, tmp_path)


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "OPTForCausalLM"])
def test_a_tied_head_is_not_written_and_a_second_copy_must_be_equal(name, tmp_path):
    hub.save(models.MODELS[name], models.params_of(name), tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    assert "lm_head.weight" not in tensors
    table = next(value for key, value in tensors.items() if key.endswith("embed_tokens.weight"))
    safetensors.numpy.save_file(tensors | {"lm_head.weight": table.copy()}, tmp_path / FILE)
    assert models.same(hub.load(tmp_path)[1], models.params_of(name))
    safetensors.numpy.save_file(tensors | {"lm_head.weight": table + 1}, tmp_path / FILE)
    with pytest.raises(HubError, match="lm_head.weight differs from .*embed_tokens.weight"):
        hub.load(tmp_path)


def test_a_head_of_its_own_is_no_second_copy(tmp_path):
    name = "LlamaForCausalLM"
    hub.save(models.MODELS[name], models.params_of(name), tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    del tensors["lm_head.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / FILE)
    with pytest.raises(HubError, match="1 missing: lm_head.weight"):
        hub.load(tmp_path)


def test_names_of_older_files(tmp_path):
    """Meta's OPT files lack `model.`; files of the first Llamas hold the frequencies of every layer."""
    for name, rename, extra in (
        ("OPTForCausalLM", lambda key: key.removeprefix("model."), {}),
        ("LlamaForCausalLM", str, {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}),
    ):
        hub.save(models.MODELS[name], models.params_of(name), tmp_path)
        tensors = safetensors.numpy.load_file(tmp_path / FILE)
        old = {rename(key): value for key, value in tensors.items()} | extra
        safetensors.numpy.save_file(old, tmp_path / FILE)
        assert models.same(hub.load(tmp_path)[1], models.params_of(name))


def test_older_programs_find_theta_and_scaling_where_they_look(tmp_path):
    hub.save(models.MODELS["LlamaForCausalLM"], models.params_of("LlamaForCausalLM"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["rope_scaling"]["rope_type"] == "llama3" and config["eos_token_id"] == [2, 3]


def test_dropout_that_training_will_not_follow_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        opt.to_opt({"dropout": 0.1})
    assert "dropout is 0.1, training will use 0.0" in caplog.text


@pytest.mark.parametrize("name", list(DECODERS))
def test_decoders_known_by_name_survive_the_way_to_hugging_face_and_back(name):
    config = DECODERS[name]
    to, back = {
        "llama": (llama.from_llama, llama.to_llama),
        "mistral": (llama.from_mistral, llama.to_mistral),
        "qwen2": (llama.from_qwen2, llama.to_qwen2),
        "opt": (opt.from_opt, opt.to_opt),
    }[config.family]
    assert back(to(config)) == config
