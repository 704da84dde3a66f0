"""BertModel, and VisionTextDualEncoderModel made of a CLIP image tower and a BERT.

Source of names and defaults: transformers, models/bert and models/vision_text_dual_encoder.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmjax.errors import HubError
from vlmjax.hub.clip import from_vit, head_rows, to_vit, vision_rows
from vlmjax.hub.family import Family, activation, note_training_only, require
from vlmjax.hub.table import Names, Row, linear, norm
from vlmjax.models.bert import Bert, BertConfig
from vlmjax.models.clip import Clip, ClipConfig, example_inputs

DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "is_decoder": False,
    "add_cross_attention": False,
}
_NO_PADDING = -1  # `pad_token_id: null`: no row of the word table is held still, and no id is -1

# Google's release named the norms' parameters gamma and beta; the first files on the hub still do.
OLD_NORMS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))


def attention_rows(theirs: str, ours: str, layers: int | None) -> list[Row]:
    """Rows of one attention sub-layer, of every layer."""
    rows: list[Row] = []
    for name in ("query", "key", "value"):
        rows += linear(f"{theirs}.self.{name}", f"{ours}/self/{name}", layers=layers)
    return rows + join_rows(f"{theirs}.output", f"{ours}/output", layers)


def join_rows(theirs: str, ours: str, layers: int | None) -> list[Row]:
    """Rows of how a sub-layer ends."""
    dense = linear(f"{theirs}.dense", f"{ours}/dense", layers=layers)
    return dense + norm(f"{theirs}.LayerNorm", f"{ours}/LayerNorm", layers=layers)


def encoder_rows(config: BertConfig, attentions: Mapping[str, str]) -> list[Row]:
    """Rows of embeddings and layers; `attentions` are the sub-layers of attention by Hugging Face's name, and ours."""
    tables = ["word_embeddings", "position_embeddings"]
    tables += ["token_type_embeddings"] * (config.type_vocab_size is not None)
    rows = [Row(f"embeddings.{name}.weight", f"embeddings/{name}") for name in tables]
    rows += norm("embeddings.LayerNorm", "embeddings/LayerNorm")
    hf, path, layers = "encoder.layer.{layer}", "encoder/layer", config.depth
    for theirs, ours in attentions.items():
        rows += attention_rows(f"{hf}.{theirs}", f"{path}/{ours}", layers)
    rows += linear(f"{hf}.intermediate.dense", f"{path}/intermediate/dense", layers=layers)
    return rows + join_rows(f"{hf}.output", f"{path}/output", layers)


def language_head_rows(hf: str, path: str) -> list[Row]:
    """Rows of what makes words of states (`cls.predictions`); its last kernel is the word embedding."""
    rows = linear(f"{hf}.transform.dense", f"{path}dense")
    return rows + norm(f"{hf}.transform.LayerNorm", f"{path}LayerNorm") + [Row(f"{hf}.bias", f"{path}bias")]


def bert_rows(config: BertConfig) -> list[Row]:
    """Rows of a BERT with its pooler."""
    return encoder_rows(config, {"attention": "attention"}) + linear("pooler.dense", "pooler/dense")


def to_bert(config: Mapping[str, Any], where: str = "config.json: bert") -> BertConfig:
    """Hugging Face's BertConfig -> ours."""
    c = DEFAULTS | config
    require(c, where, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    note_training_only(c, where, "attention_probs_dropout_prob", c["hidden_dropout_prob"])
    return BertConfig(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        mlp_dim=c["intermediate_size"],
        vocab_size=c["vocab_size"],
        max_length=c["max_position_embeddings"],
        type_vocab_size=c["type_vocab_size"],
        activation=activation(c, where),
        layer_norm_eps=c["layer_norm_eps"],
        dropout=float(c["hidden_dropout_prob"]),
        pad_token_id=_NO_PADDING if c["pad_token_id"] is None else c["pad_token_id"],
    )


def from_bert(config: BertConfig) -> dict[str, Any]:
    """Our BertConfig -> Hugging Face's."""
    return DEFAULTS | {
        "model_type": "bert",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.type_vocab_size,
        "hidden_act": config.activation,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "pad_token_id": None if config.pad_token_id == _NO_PADDING else config.pad_token_id,
    }


def _to_dual(config: Mapping[str, Any]) -> Clip:
    c = {"projection_dim": 512, "logit_scale_init_value": 2.6592} | config
    for name, wanted in (("vision_config", "clip_vision_model"), ("text_config", "bert")):
        kind = (c.get(name) or {}).get("model_type")
        if kind != wanted:
            raise HubError(
                f"{name}.model_type is {kind!r}; the supported dual encoder is CLIP's image tower with BERT"
            )
    towers = to_vit(c["vision_config"]), to_bert(c["text_config"], "text_config")
    return Clip(ClipConfig(*towers, c["projection_dim"], float(c["logit_scale_init_value"])))


def _from_dual(model: Clip) -> dict[str, Any]:
    c = model.config
    return {
        "model_type": "vision-text-dual-encoder",
        "projection_dim": c.projection_dim,
        "logit_scale_init_value": c.logit_scale_init,
        "vision_config": from_vit(c.image, c.projection_dim),
        "text_config": from_bert(c.text),
    }


def _dual_rows(model: Clip) -> list[Row]:
    # transformers 4 keeps the tower under a second `vision_model`; transformers 5 writes one and reads both.
    images = vision_rows(model.config.image, hf="vision_model.vision_model")
    texts = [row.under("text_model.", "text_model/") for row in bert_rows(model.config.text)]
    return images + texts + head_rows()


BERT = Family(
    architecture="BertModel",
    to_model=lambda config: Bert(to_bert(config)),
    to_config=lambda m: from_bert(m.config),
    rows=lambda m: bert_rows(m.config),
    names=Names(((r"^bert\.", ""), *OLD_NORMS), (r"embeddings\.(position_ids|token_type_ids)",)),
    inputs=lambda m: {"input_ids": np.zeros((1, 1), np.int32)},
    within={"BertForPreTraining": (r"cls\..*",), "BertForMaskedLM": (r"cls\..*",)},
    processor=None,
)
DUAL_ENCODER = Family(
    architecture="VisionTextDualEncoderModel",
    to_model=_to_dual,
    to_config=_from_dual,
    rows=_dual_rows,
    names=Names(
        ((r"^vision_model\.(?!vision_model\.)", "vision_model.vision_model."), *OLD_NORMS),
        (
            r"vision_model\.vision_model\.embeddings\.position_ids",
            r"text_model\.embeddings\.(position_ids|token_type_ids)",
        ),
    ),
    inputs=lambda m: example_inputs(m.config),
    within={},
    processor="VisionTextDualEncoderProcessor",
    beside={"logit_bias": None},
)
