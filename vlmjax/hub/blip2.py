"""Blip2ForImageTextRetrieval: BLIP-2 after its first stage.

Source of names and defaults: transformers, models/blip_2/{modeling_blip_2,configuration_blip_2}.py. What the class
cannot express: the temperature, a key of config.json; the head that writes, a file beside the weights; a norm between
tower and Q-Former that has another epsilon than the tower, which is written with a warning; CLIP's tower, refused.
"""

import logging
from collections.abc import Mapping
from typing import Any

from vlmjax.errors import HubError
from vlmjax.hub.bert import attention_rows, join_rows, language_head_rows
from vlmjax.hub.blip import FORM_KEY, PRETRAINING, names_of, vision_rows
from vlmjax.hub.clip import sizes_of, tower
from vlmjax.hub.family import Family, activation, note_training_only, only, require
from vlmjax.hub.table import Names, Row, batched, linear, norm
from vlmjax.models.bert import BertConfig
from vlmjax.models.blip2 import Blip2, Blip2Retriever, example_inputs
from vlmjax.models.blip2_config import TEMPERATURE, Blip2Config
from vlmjax.models.qformer import QformerConfig
from vlmjax.models.vit import VitConfig

log = logging.getLogger(__name__)

# What a key means where a configuration leaves it out.
VISION_DEFAULTS = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "initializer_range": 1e-10,
    "qkv_bias": True,
}
QFORMER_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 1408,
    "use_qformer_text_input": False,
}
DEFAULTS = {
    "num_query_tokens": 32,
    "image_text_hidden_size": 256,
    "image_token_index": None,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
}
# How BLIP-2's tower differs from CLIP's.
FORM = {"class_token": True, "pre_norm": False, "patch_bias": True, "pool": "none", "post_norm": False}
# Our own keys: epsilon of the norm between tower and Q-Former where it is not the tower's, and the id of [DEC].
EPS_KEY, DEC_KEY = "vlmjax_ln_vision_eps", "vlmjax_dec_token_id"
_HEAD = "cls.predictions"


# ---- configurations


def to_image(config: Mapping[str, Any]) -> VitConfig:
    """Blip2VisionConfig of transformers -> ours."""
    c = VISION_DEFAULTS | config
    require(c, "vision_config", qkv_bias=True)
    return tower(c, "vision_config", init="normal", **FORM)


def from_image(config: VitConfig) -> dict[str, Any]:
    """Ours -> Blip2VisionConfig of transformers, with every key."""
    only(config, "Blip2VisionModel", **FORM)
    sizes = {key: value for key, value in sizes_of(config).items() if key in VISION_DEFAULTS}
    return VISION_DEFAULTS | sizes | {"model_type": "blip_2_vision_model", "initializer_range": 0.02}


def to_qformer(config: Mapping[str, Any], queries: int, where: str = "qformer_config") -> QformerConfig:
    """Blip2QFormerConfig of transformers -> ours."""
    c = QFORMER_DEFAULTS | config
    note_training_only(c, where, "attention_probs_dropout_prob", c["hidden_dropout_prob"])
    bert = BertConfig(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        mlp_dim=c["intermediate_size"],
        vocab_size=c["vocab_size"],
        max_length=c["max_position_embeddings"],
        type_vocab_size=None,
        activation=activation(c, where),
        layer_norm_eps=c["layer_norm_eps"],
        dropout=float(c["hidden_dropout_prob"]),
        pad_token_id=c["pad_token_id"],
    )
    return QformerConfig(bert, queries, c["cross_attention_frequency"], bool(c["use_qformer_text_input"]))


def from_qformer(config: QformerConfig, image_width: int) -> dict[str, Any]:
    """Ours -> Blip2QFormerConfig of transformers, with every key."""
    bert = config.bert
    return QFORMER_DEFAULTS | {
        "model_type": "blip_2_qformer",
        "vocab_size": bert.vocab_size,
        "hidden_size": bert.width,
        "num_hidden_layers": bert.depth,
        "num_attention_heads": bert.heads,
        "intermediate_size": bert.mlp_dim,
        "hidden_act": bert.activation,
        "hidden_dropout_prob": bert.dropout,
        "attention_probs_dropout_prob": bert.dropout,
        "max_position_embeddings": bert.max_length,
        "layer_norm_eps": bert.layer_norm_eps,
        "pad_token_id": bert.pad_token_id,
        "cross_attention_frequency": config.cross_attention_frequency,
        "encoder_hidden_size": image_width,
        "use_qformer_text_input": config.reads_text,
    }


def to_epsilon(config: Mapping[str, Any], image: VitConfig) -> float:
    """Epsilon of the norm between tower and Q-Former: the tower's, which transformers uses, or what we wrote."""
    return float(config.get(EPS_KEY, image.layer_norm_eps))


def from_epsilon(epsilon: float, image: VitConfig) -> dict[str, Any]:
    """Key of that epsilon where it is another, which transformers does not read."""
    if epsilon == image.layer_norm_eps:
        return {}
    log.warning(
        "the norm between tower and Q-Former has epsilon %g, transformers will use the tower's, %g: its outputs differ "
        "in the sixth digit; vlmjax reads the folder exactly",
        epsilon,
        image.layer_norm_eps,
    )
    return {EPS_KEY: epsilon}


def _to_retriever(config: Mapping[str, Any]) -> Blip2Retriever:
    c, form = DEFAULTS | config, config.get(FORM_KEY)
    if form not in (None, PRETRAINING):
        raise HubError(f"{FORM_KEY} is {form!r}; supported: {PRETRAINING}, or no such key")
    image = to_image(c.get("vision_config") or {})
    qformer = to_qformer(c.get("qformer_config") or {}, c["num_query_tokens"])
    if not qformer.reads_text:
        raise HubError(
            "qformer_config.use_qformer_text_input is False: this Q-Former cannot read texts, which "
            "Blip2ForImageTextRetrieval compares with images; set it to true if the file has the tensors"
        )
    if c["image_token_index"] is not None:
        log.warning("image_token_index is not used: give input_ids without placeholders of images")
    return (Blip2Retriever if form is None else Blip2)(
        Blip2Config(
            image=image,
            qformer=qformer,
            projection_dim=c["image_text_hidden_size"],
            ln_vision_eps=to_epsilon(c, image),
            # [DEC] was added after BERT's last word.
            bos_token_id=c.get(DEC_KEY, qformer.bert.vocab_size - 1),
        )
    )


def _from_retriever(model: Blip2Retriever) -> dict[str, Any]:
    config = model.config
    return DEFAULTS | {
        "model_type": "blip-2",
        "vision_config": from_image(config.image),
        "qformer_config": from_qformer(config.qformer, config.image.width),
        "num_query_tokens": config.qformer.queries,
        "image_text_hidden_size": config.projection_dim,
        DEC_KEY: config.bos_token_id,
        **from_epsilon(config.ln_vision_eps, config.image),
        **({FORM_KEY: PRETRAINING} if isinstance(model, Blip2) else {}),
    }


# ---- tables


def qformer_rows(config: QformerConfig, words: str = "embeddings") -> list[Row]:
    """Rows of a Q-Former; `words` is where its class keeps their tables."""
    rows = [Row("query_tokens", "qformer/query_tokens", batched(1))]
    rows += norm("qformer.layernorm", "qformer/embeddings/LayerNorm")
    for name in ("word_embeddings", "position_embeddings") * config.reads_text:
        rows.append(Row(f"{words}.{name}.weight", f"qformer/embeddings/{name}"))
    every = config.cross_attention_frequency
    groups, rest = divmod(config.bert.depth, every)
    for place in range(every if groups else rest):
        if groups:
            stacked = _layer_rows(config, f"qformer/groups/layer_{place}", place == 0, groups)
            rows += [row._replace(first=place, step=every) for row in stacked]
        if place < rest:
            number = groups * every + place
            single = _layer_rows(config, f"qformer/rest/layer_{place}", place == 0, None)
            rows += [row._replace(hf=row.hf.format(layer=number)) for row in single]
    return rows


def _layer_rows(config: QformerConfig, path: str, looks: bool, layers: int | None) -> list[Row]:
    """Rows of one layer of every group, or of one layer alone."""
    hf, rows = "qformer.encoder.layer.{layer}", []
    for name in ["attention"] + ["crossattention"] * looks:
        rows += attention_rows(f"{hf}.{name}", f"{path}/{name}", layers)
    for kind in ["_query"] + [""] * config.reads_text:
        rows += linear(f"{hf}.intermediate{kind}.dense", f"{path}/intermediate{kind}/dense", layers=layers)
        rows += join_rows(f"{hf}.output{kind}", f"{path}/output{kind}", layers)
    return [row._replace(hf=row.hf.replace(".self.", ".attention.")) for row in rows]


def head_rows() -> list[Row]:
    """Rows of what a model in pretraining has besides."""
    return language_head_rows(_HEAD, "head/")


def retrieval_rows(model: Blip2Retriever) -> list[Row]:
    """Rows of a Blip2Retriever, or of a Blip2."""
    rows = vision_rows(model.config.image, "ln_vision") + qformer_rows(model.config.qformer)
    names = {"vision_projection": "vision_proj", "text_projection": "text_proj", "itm_head": "itm_head"}
    for theirs, ours in names.items():
        rows += linear(theirs, ours)
    return rows + (head_rows() if isinstance(model, Blip2) else [])


RETRIEVAL = Family(
    architecture="Blip2ForImageTextRetrieval",
    to_model=_to_retriever,
    to_config=_from_retriever,
    rows=retrieval_rows,
    names=Names(ignored=(r"embeddings\.position_ids",)),
    inputs=example_inputs,
    within={},
    processor="Blip2Processor",
    beside={"temp": TEMPERATURE},
    aside=lambda m: names_of(head_rows()) if isinstance(m, Blip2) else frozenset(),
)
