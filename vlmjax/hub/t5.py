"""T5ForConditionalGeneration: T5, its version 1.1, FlanT5.

Source of names and defaults: transformers, models/t5/{modeling_t5,configuration_t5}.py. transformers 5 calls every head
tied and says by `scale_decoder_outputs` what older files say by `tie_word_embeddings`; both are written, and the head
of version 1.1 is a tensor of its own.
"""

import logging
from collections.abc import Mapping
from typing import Any

from vlmjax.errors import HubError
from vlmjax.hub.family import Family, nearest, note_training_only, require
from vlmjax.hub.llama import from_ends, to_ends
from vlmjax.hub.table import Names, Row, linear
from vlmjax.models.t5 import T5, example_inputs
from vlmjax.models.t5_layers import T5Config
from vlmjax.ops.activations import ACTIVATIONS

log = logging.getLogger(__name__)

# What a key means where a configuration leaves it out.
DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "feed_forward_proj": "relu",
    "is_encoder_decoder": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
# Our names of the sub-layers of a block, in the file's order.
_SUBLAYERS = {"encoder": ("attention", "mlp"), "decoder": ("attention", "cross", "mlp")}
_ATTENTION = {"attention": ("SelfAttention", "self_attn"), "cross": ("EncDecAttention", "cross_attn")}


def t5_rows(config: T5Config) -> list[Row]:
    """Rows of a T5. A tied head has none: the file holds the embedding alone."""
    rows = [Row("shared.weight", "token_embedding")]
    mlp = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
    mlp = mlp if config.gated else {"wi": "fc1", "wo": "fc2"}
    for stack, depth in (("encoder", config.depth), ("decoder", config.decoder_depth)):
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rows.append(Row(bias, f"{stack}/relative_bias"))
        for place, name in enumerate(_SUBLAYERS[stack]):
            hf, path = f"{stack}.block.{{layer}}.layer.{place}", f"{stack}/layers"
            rows.append(Row(f"{hf}.layer_norm.weight", f"{path}/{name}_norm/scale", layers=depth))
            theirs, ours = _ATTENTION.get(name, ("DenseReluDense", "mlp"))
            parts = mlp if name == "mlp" else {part: f"{part}_proj" for part in "qkvo"}
            for part, own in parts.items():
                rows += linear(f"{hf}.{theirs}.{part}", f"{path}/{ours}/{own}", bias=False, layers=depth)
        rows.append(Row(f"{stack}.final_layer_norm.weight", f"{stack}/norm/scale"))
    return rows + [Row("lm_head.weight", "lm_head")] * (not config.tied)


def to_t5(config: Mapping[str, Any], where: str = "config.json: t5") -> T5Config:
    """T5Config of transformers -> ours. `gated-gelu` is gelu_new there, unless `dense_act_fn` says otherwise."""
    c = DEFAULTS | config
    require(c, where, is_encoder_decoder=True)
    note_training_only(c, where, "dropout_rate", 0.0)
    first, _, rest = c["feed_forward_proj"].partition("-")
    name = "gelu_new" if c["feed_forward_proj"] == "gated-gelu" else rest or first
    name = c.get("dense_act_fn", name)
    if name not in ACTIVATIONS:
        raise HubError(f"{where}: the activation is {name!r}; {nearest(str(name), ACTIVATIONS)}")
    start = c.get("decoder_start_token_id")
    return T5Config(
        width=c["d_model"],
        depth=c["num_layers"],
        decoder_depth=c.get("num_decoder_layers") or c["num_layers"],
        heads=c["num_heads"],
        head_dim=c["d_kv"],
        mlp_dim=c["d_ff"],
        vocab_size=c["vocab_size"],
        buckets=c["relative_attention_num_buckets"],
        max_distance=c["relative_attention_max_distance"],
        norm_eps=c["layer_norm_epsilon"],
        activation=name,
        gated=c.get("is_gated_act", first == "gated"),
        tied=c.get("scale_decoder_outputs", c.get("tie_word_embeddings") is not False),
        max_length=c.get("n_positions", 512),
        pad_token_id=c["pad_token_id"],
        eos_token_ids=to_ends(c["eos_token_id"]),
        decoder_start_token_id=c["pad_token_id"] if start is None else start,
    )


def from_t5(config: T5Config) -> dict[str, Any]:
    """Ours -> T5Config of transformers, with every key."""
    if config.decoder_depth > config.depth:
        log.warning(
            "%d layers write and %d read: transformers 5 computes with this T5, but its generate raises an IndexError",
            config.decoder_depth,
            config.depth,
        )
    name = "gelu" if config.activation == "gelu_new" else config.activation
    return DEFAULTS | {
        "model_type": "t5",
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_layers": config.depth,
        "num_decoder_layers": config.decoder_depth,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "dropout_rate": 0.0,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": f"gated-{name}" if config.gated else name,
        "dense_act_fn": config.activation,
        "is_gated_act": config.gated,
        "tie_word_embeddings": config.tied,
        "scale_decoder_outputs": config.tied,
        "n_positions": config.max_length,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": from_ends(config.eos_token_ids),
        "decoder_start_token_id": config.decoder_start_token_id,
    }


def copies(config: T5Config) -> dict[str, str]:
    """Copies of the word embedding that files hold."""
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *["lm_head.weight"] * config.tied]
    return dict.fromkeys(names, "shared.weight")


# The first files hold a table of distances that nothing reads.
UNREAD = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)
GENERATION = Family(
    architecture="T5ForConditionalGeneration",
    to_model=lambda config: T5(to_t5(config)),
    to_config=lambda m: from_t5(m.config),
    rows=lambda m: t5_rows(m.config),
    names=Names(ignored=UNREAD),
    inputs=example_inputs,
    within={},
    processor=None,
    copies=lambda m: copies(m.config),
)
