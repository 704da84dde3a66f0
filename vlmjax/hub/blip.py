"""BlipForConditionalGeneration, BlipForImageTextRetrieval and BlipForQuestionAnswering.

Source of names and defaults: transformers, models/blip/{modeling_blip,modeling_blip_text,configuration_blip}.py. Its
defaults are not those of the released networks, so every key is written and none is guessed: what a folder leaves out
means what the class says. What the classes cannot express: the temperature, a key of config.json; the decoder of a
model in pretraining, a file beside the weights of its retrieval half; NLVR2, and VQA where text and image tower
differ in width, which are refused.
"""

from collections.abc import Mapping
from typing import Any

from vlmjax.errors import HubError
from vlmjax.hub.bert import attention_rows, encoder_rows, language_head_rows
from vlmjax.hub.clip import sizes_of, tower
from vlmjax.hub.family import Family, activation, note_training_only, only, require
from vlmjax.hub.table import Names, Row, batched, linear, norm, patches
from vlmjax.models import blip_tasks
from vlmjax.models.bert import BertConfig
from vlmjax.models.blip import Blip, BlipCaptioner, BlipRetriever, example_inputs
from vlmjax.models.blip_config import TEMPERATURE, BlipConfig
from vlmjax.models.blip_tasks import BlipVqa
from vlmjax.models.med import DECODER, ENCODER
from vlmjax.models.vit import VitConfig

# What a key means where a configuration leaves it out. The released networks have otherwise: epsilon 1e-6 of the image
# tower, 12 heads, dropout and label smoothing 0.1.
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 384,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "initializer_range": 1e-10,
}
TEXT_DEFAULTS = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "encoder_hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 30522,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sep_token_id": 102,
    "is_decoder": True,
    "use_cache": True,
    "tie_word_embeddings": True,
    "label_smoothing": 0.0,
}
DEFAULTS = {
    "projection_dim": 512,
    "logit_scale_init_value": 2.6592,
    "image_text_hidden_size": 256,
    "label_smoothing": 0.0,
    "tie_word_embeddings": True,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
}
# How BLIP's tower differs from CLIP's.
FORM = {"class_token": True, "pre_norm": False, "patch_bias": True, "pool": "none"}
# Our own keys: the token with which a text that is read with an image begins, where it is not its own; and that the
# decoder of pretraining is in a file beside.
ENC_KEY, FORM_KEY, PRETRAINING = "vlmjax_enc_token_id", "vlmjax_form", "pretraining"
_HEAD = "text_decoder.cls.predictions"
_CROSS = {"crossattention": "crossattention"}


# ---- configurations


def to_blip(config: Mapping[str, Any]) -> BlipConfig:
    """BlipConfig of transformers -> ours."""
    c = DEFAULTS | config
    text = TEXT_DEFAULTS | (c.get("text_config") or {})
    require(text, "text_config", is_decoder=True, tie_word_embeddings=True)
    image = tower(VISION_DEFAULTS | (c.get("vision_config") or {}), "vision_config", init="normal", **FORM)
    return BlipConfig(
        image=image,
        text=_to_text(text),
        projection_dim=c["image_text_hidden_size"],
        bos_token_id=text["bos_token_id"],
        enc_token_id=c.get(ENC_KEY),
        sep_token_id=text["sep_token_id"],
        label_smoothing=float(text["label_smoothing"]),
    )


def _to_text(c: Mapping[str, Any]) -> BertConfig:
    note_training_only(c, "text_config", "attention_probs_dropout_prob", c["hidden_dropout_prob"])
    return BertConfig(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        mlp_dim=c["intermediate_size"],
        vocab_size=c["vocab_size"],
        max_length=c["max_position_embeddings"],
        type_vocab_size=None,
        activation=activation(c, "text_config"),
        layer_norm_eps=c["layer_norm_eps"],
        dropout=float(c["hidden_dropout_prob"]),
        pad_token_id=c["pad_token_id"],
    )


def from_blip(config: BlipConfig) -> dict[str, Any]:
    """Ours -> BlipConfig of transformers, with every key."""
    only(config.image, "BlipVisionModel", **FORM)
    sizes = {key: value for key, value in sizes_of(config.image).items() if key in VISION_DEFAULTS}
    vision = {"model_type": "blip_vision_model", "initializer_range": 0.02}
    enc = {} if config.enc_token_id is None else {ENC_KEY: config.enc_token_id}
    return DEFAULTS | {
        "model_type": "blip",
        "image_text_hidden_size": config.projection_dim,
        "label_smoothing": config.label_smoothing,
        "vision_config": VISION_DEFAULTS | sizes | vision,
        "text_config": _from_text(config),
        **enc,
    }


def _from_text(config: BlipConfig) -> dict[str, Any]:
    text = config.text
    return TEXT_DEFAULTS | {
        "model_type": "blip_text_model",
        "hidden_size": text.width,
        "encoder_hidden_size": config.image.width,
        "projection_dim": text.width,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.heads,
        "intermediate_size": text.mlp_dim,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_length,
        "hidden_act": text.activation,
        "layer_norm_eps": text.layer_norm_eps,
        "hidden_dropout_prob": text.dropout,
        "attention_probs_dropout_prob": text.dropout,
        "pad_token_id": text.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "sep_token_id": config.sep_token_id,
        "label_smoothing": config.label_smoothing,
    }


# ---- tables


def vision_rows(config: VitConfig, last_norm: str = "vision_model/post_layernorm") -> list[Row]:
    """Rows of the image tower; the file lays q, k and v of a layer in one tensor."""
    ours, theirs = "vision_model/embeddings", "vision_model.embeddings"
    kernel = patches(config.patch_size)
    rows = [
        Row(f"{theirs}.class_embedding", f"{ours}/class_embedding", batched(2)),
        Row(f"{theirs}.position_embedding", f"{ours}/position_embedding", batched(1)),
        Row(f"{theirs}.patch_embedding.weight", f"{ours}/patch_embedding/kernel", kernel),
        Row(f"{theirs}.patch_embedding.bias", f"{ours}/patch_embedding/bias"),
    ]
    theirs, ours, layers = "vision_model.encoder.layers.{layer}", "vision_model/encoder/layers", config.depth
    for name in ("layer_norm1", "layer_norm2"):
        rows += norm(f"{theirs}.{name}", f"{ours}/{name}", layers=layers)
    for row in linear(f"{theirs}.self_attn.qkv", f"{ours}/self_attn/{{}}_proj", layers=layers):
        rows.append(row._replace(path=tuple(row.path.format(part) for part in "qkv")))
    rows += linear(f"{theirs}.self_attn.projection", f"{ours}/self_attn/out_proj", layers=layers)
    for name in ("fc1", "fc2"):
        rows += linear(f"{theirs}.mlp.{name}", f"{ours}/mlp/{name}", layers=layers)
    return rows + norm("vision_model.post_layernorm", last_norm)


def encoding_rows(config: BertConfig, path: str = "text_model/") -> list[Row]:
    """Rows of a text transformer that reads."""
    rows = encoder_rows(config, {"attention": ENCODER} | _CROSS)
    return [row.under("text_encoder.", path) for row in rows]


def writing_rows(config: BertConfig, path: str = "text_model/") -> list[Row]:
    """Rows of a text transformer that writes."""
    rows = encoder_rows(config, {"attention": DECODER} | _CROSS)
    return [row.under("text_decoder.bert.", path) for row in rows] + language_head_rows(_HEAD, f"{path}head/")


def contrast_rows() -> list[Row]:
    """Rows of projections and matching head."""
    return [row for name in ("vision_proj", "text_proj", "itm_head") for row in linear(name, name)]


def decoder_rows(config: BertConfig) -> list[Row]:
    """Rows of what a model in pretraining has beside its retrieval half."""
    hf, path = "text_decoder.bert.encoder.layer.{layer}.attention", f"text_model/encoder/layer/{DECODER}"
    return attention_rows(hf, path, config.depth) + language_head_rows(_HEAD, "text_model/head/")


def retrieval_rows(model: BlipRetriever) -> list[Row]:
    """Rows of a BlipRetriever, or of a Blip."""
    config = model.config
    rows = vision_rows(config.image) + encoding_rows(config.text) + contrast_rows()
    return rows + (decoder_rows(config.text) if isinstance(model, Blip) else [])


def vqa_rows(config: BlipConfig) -> list[Row]:
    """Rows of a BlipVqa."""
    rows = vision_rows(config.image) + encoding_rows(config.text, "text_encoder/")
    return rows + writing_rows(config.text, "text_decoder/")


def names_of(rows: list[Row]) -> frozenset[str]:
    """Names of all tensors of some rows."""
    return frozenset(name for row in rows for name in row.names())


def _tied(_: Any) -> dict[str, str]:
    """Copies of the word embedding and of the head's bias that files hold."""
    words = "text_decoder.bert.embeddings.word_embeddings.weight"
    return {f"{_HEAD}.decoder.weight": words, f"{_HEAD}.decoder.bias": f"{_HEAD}.bias"}


# ---- families


def _to_retriever(config: Mapping[str, Any]) -> BlipRetriever:
    form = config.get(FORM_KEY)
    if form not in (None, PRETRAINING):
        raise HubError(f"{FORM_KEY} is {form!r}; supported: {PRETRAINING}, or no such key")
    return (BlipRetriever if form is None else Blip)(to_blip(config))


def _from_retriever(model: BlipRetriever) -> dict[str, Any]:
    return from_blip(model.config) | ({FORM_KEY: PRETRAINING} if isinstance(model, Blip) else {})


def _from_vqa(model: BlipVqa) -> dict[str, Any]:
    image, text = model.config.image.width, model.config.text.width
    if image != text:
        raise HubError(
            f"BlipForQuestionAnswering has one configuration for question encoder and answer decoder, which therefore "
            f"look at states of one width; the image tower is {image} wide, the text transformer {text}. Keep this "
            "model as a checkpoint of vlmjax"
        )
    return from_blip(model.config)


NAMES = Names(
    ignored=(
        r"(text_encoder|text_decoder\.bert)\.embeddings\.position_ids",
        r"vision_model\.embeddings\.position_ids",
    )
)
CAPTION = Family(
    architecture="BlipForConditionalGeneration",
    to_model=lambda config: BlipCaptioner(to_blip(config)),
    to_config=lambda m: from_blip(m.config),
    rows=lambda m: vision_rows(m.config.image) + writing_rows(m.config.text),
    names=NAMES,
    inputs=example_inputs,
    within={},
    processor="BlipProcessor",
    copies=_tied,
)
RETRIEVAL = Family(
    architecture="BlipForImageTextRetrieval",
    to_model=_to_retriever,
    to_config=_from_retriever,
    rows=retrieval_rows,
    names=NAMES,
    inputs=example_inputs,
    within={},
    processor="BlipProcessor",
    beside={"temp": TEMPERATURE},
    aside=lambda m: names_of(decoder_rows(m.config.text)) if isinstance(m, Blip) else frozenset(),
)
VQA = Family(
    architecture="BlipForQuestionAnswering",
    to_model=lambda config: BlipVqa(to_blip(config)),
    to_config=_from_vqa,
    rows=lambda m: vqa_rows(m.config),
    names=NAMES,
    inputs=blip_tasks.example_inputs,
    within={},
    processor="BlipProcessor",
    copies=_tied,
)
