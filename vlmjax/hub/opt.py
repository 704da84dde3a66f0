"""OPTForCausalLM, in the usual form and in that of opt-350m, which normalises last and has a narrow embedding.

Source of names and defaults: transformers, models/opt/{modeling_opt,configuration_opt}.py.
"""

from collections.abc import Mapping
from typing import Any

from vlmjax.errors import HubError
from vlmjax.hub.family import Family, activation, note_training_only, only, require
from vlmjax.hub.llama import decoder_inputs, from_ends, to_ends
from vlmjax.hub.table import Names, Row, linear, norm
from vlmjax.models.decoder import Decoder, DecoderConfig

DEFAULTS = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "layerdrop": 0.0,
    "init_std": 0.02,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}
_EPS = 1e-5  # torch's default, which the class keeps


def opt_rows(config: DecoderConfig) -> list[Row]:
    """Rows of an OPT."""
    hf, path, layers = "model.decoder.layers.{layer}", "layers", config.depth
    rows = [
        Row("model.decoder.embed_tokens.weight", "token_embedding"),
        Row("model.decoder.embed_positions.weight", "position_embedding"),
    ]
    if config.embed_dim is not None:
        for name in ("project_in", "project_out"):
            rows += linear(f"model.decoder.{name}", name, bias=False)
    for theirs, ours in (("self_attn_layer_norm", "attention_norm"), ("final_layer_norm", "mlp_norm")):
        rows += norm(f"{hf}.{theirs}", f"{path}/{ours}", layers=layers)
    for theirs, ours in (
        ("q_proj", "q_proj"),
        ("k_proj", "k_proj"),
        ("v_proj", "v_proj"),
        ("out_proj", "o_proj"),
    ):
        rows += linear(f"{hf}.self_attn.{theirs}", f"{path}/self_attn/{ours}", layers=layers)
    for name in ("fc1", "fc2"):
        rows += linear(f"{hf}.{name}", f"{path}/mlp/{name}", layers=layers)
    if config.final_norm:
        rows += norm("model.decoder.final_layer_norm", "norm")
    return rows + [Row("lm_head.weight", "lm_head")] * (not config.tied)


def to_opt(config: Mapping[str, Any], where: str = "config.json: opt") -> DecoderConfig:
    """OPTConfig -> DecoderConfig."""
    c = DEFAULTS | config
    require(c, where, enable_bias=True, layer_norm_elementwise_affine=True)
    for key in ("dropout", "attention_dropout", "layerdrop"):
        note_training_only(c, where, key, 0.0)
    width, heads = c["hidden_size"], c["num_attention_heads"]
    inner = c.get("word_embed_proj_dim") or width
    return DecoderConfig(
        width=width,
        depth=c["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp_dim=c["ffn_dim"],
        vocab_size=c["vocab_size"],
        max_length=c["max_position_embeddings"],
        rope=None,
        norm="layer",
        norm_eps=_EPS,
        pre_norm=c["do_layer_norm_before"],
        final_norm=c["do_layer_norm_before"] and not c["_remove_final_layer_norm"],
        activation=activation({"hidden_act": c["activation_function"]}, where),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=c["tie_word_embeddings"],
        embed_dim=None if inner == width else inner,
        init_std=c["init_std"],
        bos_token_id=c["bos_token_id"],
        eos_token_ids=to_ends(c["eos_token_id"]),
        pad_token_id=c["pad_token_id"],
        family="opt",
    )


def from_opt(config: DecoderConfig) -> dict[str, Any]:
    """DecoderConfig -> OPTConfig."""
    cls, width = "OPTForCausalLM", config.width
    form = {"rope": None, "norm": "layer", "norm_eps": _EPS, "gated": False, "window": None}
    biases = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
    only(config, cls, **form, **biases, kv_heads=config.heads, head_dim=width // config.heads)
    if width % config.heads or config.embed_dim == width or (config.final_norm and not config.pre_norm):
        raise HubError(
            f"{cls} has a width that is a multiple of heads, an embed_dim of another width or None, and a final norm "
            f"only with pre_norm; the model has width {width}, heads {config.heads}, embed_dim {config.embed_dim}, "
            f"pre_norm {config.pre_norm}, final_norm {config.final_norm}"
        )
    return DEFAULTS | {
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "hidden_size": width,
        "word_embed_proj_dim": config.embed_dim or width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "ffn_dim": config.mlp_dim,
        "max_position_embeddings": config.max_length,
        "do_layer_norm_before": config.pre_norm,
        "_remove_final_layer_norm": config.pre_norm and not config.final_norm,
        "activation_function": config.activation,
        "dropout": 0.0,
        "init_std": config.init_std,
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": from_ends(config.eos_token_ids),
        "tie_word_embeddings": config.tied,
    }


_TABLE = "model.decoder.embed_tokens.weight"
OPT = Family(
    architecture="OPTForCausalLM",
    to_model=lambda config: Decoder(to_opt(config)),
    to_config=lambda m: from_opt(m.config),
    rows=lambda m: opt_rows(m.config),
    names=Names(spellings=((r"^decoder\.", "model.decoder."),)),  # Meta's own files
    inputs=decoder_inputs,
    within={},
    processor=None,
    copies=lambda m: {"lm_head.weight": _TABLE} if m.config.tied else {},
)
