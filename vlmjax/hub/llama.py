"""LlamaForCausalLM (Vicuna is one), MistralForCausalLM and Qwen2ForCausalLM: one table, three configurations.

Source of names and defaults: transformers, models/{llama,mistral,qwen2}/configuration_*.py, modeling_rope_utils.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmjax.errors import HubError
from vlmjax.hub.family import Family, activation, note_training_only, only
from vlmjax.hub.table import Names, Row, linear
from vlmjax.models.decoder import Decoder, DecoderConfig
from vlmjax.ops.rotary import Rope

_SHARED = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
# What a key means where a configuration leaves it out.
LLAMA_DEFAULTS = _SHARED | {
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
}
MISTRAL_DEFAULTS = _SHARED | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
QWEN2_DEFAULTS = _SHARED | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_LLAMA3 = ("low_freq_factor", "high_freq_factor")
# The parts of a decoder that all three classes have, and no other.
_FORM = {"norm": "rms", "pre_norm": True, "final_norm": True, "gated": True, "embed_dim": None}


# ---- table


def decoder_rows(config: DecoderConfig) -> list[Row]:
    """Rows of a decoder with rotary positions. A tied head has none: the file holds the embedding alone."""
    hf, path, layers = "model.layers.{layer}", "layers", config.depth
    rows = [Row("model.embed_tokens.weight", "token_embedding"), Row("model.norm.weight", "norm/scale")]
    for theirs, ours in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm")):
        rows.append(Row(f"{hf}.{theirs}.weight", f"{path}/{ours}/scale", layers=layers))
    biases = {"q_proj": config.qkv_bias, "k_proj": config.qkv_bias, "v_proj": config.qkv_bias}
    for name, bias in (biases | {"o_proj": config.out_bias}).items():
        rows += linear(f"{hf}.self_attn.{name}", f"{path}/self_attn/{name}", bias=bias, layers=layers)
    for name in ("gate_proj", "up_proj", "down_proj"):
        rows += linear(f"{hf}.mlp.{name}", f"{path}/mlp/{name}", bias=config.mlp_bias, layers=layers)
    return rows + [Row("lm_head.weight", "lm_head")] * (not config.tied)


# ---- configurations


def to_rope(config: Mapping[str, Any], where: str) -> Rope:
    """`rope_parameters` of transformers 5, or the older `rope_theta` and `rope_scaling`, which wins where both are."""
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise HubError(f"{where} has rope_type {kind!r}; supported: default, linear, llama3")
    part = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1.0):
        raise HubError(f"{where}.partial_rotary_factor is {part}; only heads that turn whole are supported")
    theta = float(given.get("rope_theta", config.get("rope_theta", 10000.0)))
    if kind == "default":
        return Rope(theta)
    missing = [key for key in ("factor", *_LLAMA3 * (kind == "llama3")) if key not in given]
    if missing:
        raise HubError(f"{where} has rope_type {kind!r} without {', '.join(missing)}")
    if kind == "linear":
        return Rope(theta, kind, float(given["factor"]))
    length = given.get("original_max_position_embeddings", config["max_position_embeddings"])
    return Rope(theta, kind, *(float(given[key]) for key in ("factor", *_LLAMA3)), int(length))


def from_rope(rope: Rope) -> dict[str, Any]:
    """The keys of transformers 5 and the older ones, which other programs read."""
    scaling = {"rope_type": "default" if rope.scaling == "none" else rope.scaling}
    if rope.scaling != "none":
        scaling["factor"] = rope.factor
    if rope.scaling == "llama3":
        scaling |= {key: getattr(rope, key) for key in _LLAMA3}
        scaling["original_max_position_embeddings"] = rope.original_max_length
    older = None if rope.scaling == "none" else scaling
    return {
        "rope_parameters": scaling | {"rope_theta": rope.theta},
        "rope_scaling": older,
        "rope_theta": rope.theta,
    }


def to_ends(value: int | Sequence[int] | None) -> tuple[int, ...]:
    """`eos_token_id` of a configuration: none, one, or several ids that end a text."""
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def from_ends(ids: tuple[int, ...]) -> int | list[int] | None:
    """Inverse of `to_ends`."""
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)


def _to_decoder(c: Mapping[str, Any], where: str, **rest: Any) -> DecoderConfig:
    note_training_only(c, where, "attention_dropout", 0.0)
    heads = c["num_attention_heads"]
    return DecoderConfig(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=heads,
        kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        mlp_dim=c["intermediate_size"],
        vocab_size=c["vocab_size"],
        max_length=c["max_position_embeddings"],
        rope=to_rope(c, where),
        norm_eps=c["rms_norm_eps"],
        activation=activation(c, where),
        tied=c["tie_word_embeddings"],
        init_std=c["initializer_range"],
        bos_token_id=c["bos_token_id"],
        eos_token_ids=to_ends(c["eos_token_id"]),
        pad_token_id=c["pad_token_id"],
        **rest,
    )


def to_llama(config: Mapping[str, Any], where: str = "config.json: llama") -> DecoderConfig:
    """LlamaConfig -> DecoderConfig."""
    c = LLAMA_DEFAULTS | config
    attention = bool(c["attention_bias"])
    return _to_decoder(
        c, where, family="llama", qkv_bias=attention, out_bias=attention, mlp_bias=bool(c["mlp_bias"])
    )


def to_mistral(config: Mapping[str, Any], where: str = "config.json: mistral") -> DecoderConfig:
    """MistralConfig -> DecoderConfig."""
    c = MISTRAL_DEFAULTS | config
    wanted = "full_attention" if c["sliding_window"] is None else "sliding_attention"
    _check_layers(c, where, wanted)
    return _to_decoder(c, where, family="mistral", window=c["sliding_window"])


def to_qwen2(config: Mapping[str, Any], where: str = "config.json: qwen2") -> DecoderConfig:
    """Qwen2Config -> DecoderConfig. Its `max_window_layers` counts the first layers, which have no window."""
    c = QWEN2_DEFAULTS | config
    window = c["sliding_window"] if c["use_sliding_window"] else None
    first = min(c["max_window_layers"], c["num_hidden_layers"])
    if window is not None and 0 < first < c["num_hidden_layers"]:
        raise HubError(
            f"{where}: {first} of {c['num_hidden_layers']} layers have no sliding window; all layers are alike here"
        )
    window = None if first else window
    _check_layers(c, where, "full_attention" if window is None else "sliding_attention")
    return _to_decoder(c, where, family="qwen2", qkv_bias=True, window=window)


def _check_layers(config: Mapping[str, Any], where: str, wanted: str) -> None:
    kinds = set(config.get("layer_types") or [wanted])
    if kinds != {wanted}:
        raise HubError(
            f"{where}.layer_types has {', '.join(sorted(kinds))}; only {wanted} throughout is supported"
        )


def _from_decoder(
    config: DecoderConfig, cls: str, defaults: Mapping[str, Any], **form: Any
) -> dict[str, Any]:
    only(config, cls, **_FORM, **form)
    if config.rope is None:
        raise HubError(f"{cls} has rotary positions, the model learned ones; set `rope`")
    return dict(defaults) | {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "tie_word_embeddings": config.tied,
        "initializer_range": config.init_std,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": from_ends(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        **from_rope(config.rope),
    }


def from_llama(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> LlamaConfig."""
    cls = "LlamaForCausalLM"
    c = _from_decoder(config, cls, LLAMA_DEFAULTS, window=None, out_bias=config.qkv_bias)
    if config.width % config.heads:
        raise HubError(
            f"{cls} wants a width that is a multiple of heads, not {config.width} and {config.heads}"
        )
    return c | {"model_type": "llama", "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def from_mistral(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> MistralConfig."""
    form = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
    c = _from_decoder(config, "MistralForCausalLM", MISTRAL_DEFAULTS, **form)
    return c | {"model_type": "mistral", "sliding_window": config.window}


def from_qwen2(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> Qwen2Config."""
    form = {"qkv_bias": True, "out_bias": False, "mlp_bias": False}
    c = _from_decoder(config, "Qwen2ForCausalLM", QWEN2_DEFAULTS, **form)
    sliding = config.window is not None
    return c | {
        "model_type": "qwen2",
        "use_sliding_window": sliding,
        "sliding_window": config.window,
        "max_window_layers": 0 if sliding else config.depth,
    }


# ---- families


def decoder_inputs(model: Decoder) -> dict[str, Any]:
    """Smallest inputs that create every parameter of a decoder."""
    return {"method": "causal_lm", "input_ids": np.zeros((1, 1), np.int32)}


LLAMA = Family(
    architecture="LlamaForCausalLM",
    to_model=lambda config: Decoder(to_llama(config)),
    to_config=lambda m: from_llama(m.config),
    rows=lambda m: decoder_rows(m.config),
    names=Names(ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)),
    inputs=decoder_inputs,
    within={},
    processor=None,
    copies=lambda m: {"lm_head.weight": "model.embed_tokens.weight"} if m.config.tied else {},
)
MISTRAL = LLAMA._replace(
    architecture="MistralForCausalLM",
    to_model=lambda config: Decoder(to_mistral(config)),
    to_config=lambda m: from_mistral(m.config),
)
QWEN2 = LLAMA._replace(
    architecture="Qwen2ForCausalLM",
    to_model=lambda config: Decoder(to_qwen2(config)),
    to_config=lambda m: from_qwen2(m.config),
)
