"""CLIPModel and its halves: CLIPVisionModel, CLIPTextModel, and both with their projection.

Source of names and defaults: transformers, models/clip/{modeling_clip,configuration_clip}.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmjax.errors import HubError
from vlmjax.hub.family import Family, activation, note_training_only, only, require
from vlmjax.hub.table import Names, Row, linear, norm, patches
from vlmjax.models.clip import Clip, ClipConfig, ClipText, ClipVision, example_inputs
from vlmjax.models.text import TextConfig
from vlmjax.models.vit import VitConfig

# What a key means where a configuration leaves it out: transformers 4 wrote only what differs from these.
_SHARED = {
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 1.0,
    "projection_dim": 512,
    "num_hidden_layers": 12,
}
VISION_DEFAULTS = _SHARED | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
}
TEXT_DEFAULTS = _SHARED | {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "pad_token_id": 1,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
_BUFFERS = (r"(vision_model|text_model)\.embeddings\.position_ids",)


# ---- tables


def block_rows(hf: str, path: str, layers: int) -> list[Row]:
    """Rows of the transformer blocks, which both towers share."""
    hf, path = hf + ".encoder.layers.{layer}", path + "/encoder/layers"
    rows: list[Row] = []
    for name in ("layer_norm1", "layer_norm2"):
        rows += norm(f"{hf}.{name}", f"{path}/{name}", layers=layers)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        rows += linear(f"{hf}.self_attn.{name}", f"{path}/self_attn/{name}", layers=layers)
    for name in ("fc1", "fc2"):
        rows += linear(f"{hf}.mlp.{name}", f"{path}/mlp/{name}", layers=layers)
    return rows


def vision_rows(config: VitConfig, hf: str = "vision_model", path: str = "vision_model") -> list[Row]:
    """Rows of the image tower. `pre_layrnorm` is spelled so in every CLIP file."""
    ours, theirs = f"{path}/embeddings", f"{hf}.embeddings"
    return [
        Row(f"{theirs}.class_embedding", f"{ours}/class_embedding"),
        Row(f"{theirs}.patch_embedding.weight", f"{ours}/patch_embedding/kernel", patches(config.patch_size)),
        Row(f"{theirs}.position_embedding.weight", f"{ours}/position_embedding"),
        *norm(f"{hf}.pre_layrnorm", f"{path}/pre_layernorm"),
        *block_rows(hf, path, config.depth),
        *norm(f"{hf}.post_layernorm", f"{path}/post_layernorm"),
    ]


def text_rows(config: TextConfig) -> list[Row]:
    """Rows of the text tower."""
    return [
        Row("text_model.embeddings.token_embedding.weight", "text_model/embeddings/token_embedding"),
        Row("text_model.embeddings.position_embedding.weight", "text_model/embeddings/position_embedding"),
        *block_rows("text_model", "text_model", config.depth),
        *norm("text_model.final_layer_norm", "text_model/final_layer_norm"),
    ]


def head_rows() -> list[Row]:
    """Rows of what joins two towers: projections without bias, and the temperature."""
    return [
        *linear("visual_projection", "visual_projection", bias=False),
        *linear("text_projection", "text_projection", bias=False),
        Row("logit_scale", "logit_scale"),
    ]


# ---- configurations


def to_vit(config: Mapping[str, Any], where: str = "vision_config") -> VitConfig:
    """CLIPVisionConfig -> VitConfig."""
    return tower(VISION_DEFAULTS | config, where)


def tower(c: Mapping[str, Any], where: str, **form: Any) -> VitConfig:
    """VitConfig of a complete configuration of an image tower; `form` is what its class has otherwise than CLIP."""
    require(c, where, num_channels=3)
    note_training_only(c, where, "attention_dropout", 0.0)
    return VitConfig(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        mlp_dim=c["intermediate_size"],
        image_size=_side(c["image_size"], f"{where}.image_size"),
        patch_size=_side(c["patch_size"], f"{where}.patch_size"),
        activation=activation(c, where),
        layer_norm_eps=c["layer_norm_eps"],
        **form,
    )


def _side(value: Any, where: str) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise HubError(f"{where} is {value!r}; Hugging Face's CLIP has square images and patches only")
    return sides.pop()


def sizes_of(config: VitConfig) -> dict[str, Any]:
    """The keys that every image tower's class has. Raises HubError where images are not square."""
    height, width = config.image_shape
    if height != width:
        raise HubError(
            f"image_size is {height}x{width}: Hugging Face's CLIP has a square position table only; "
            "train with a square image_size to export (other shapes still work at run time, by interpolation)"
        )
    return _shared(config, None) | {"image_size": height, "patch_size": config.patch_size}


def from_vit(config: VitConfig, projection_dim: int | None = None) -> dict[str, Any]:
    """VitConfig -> CLIPVisionConfig."""
    only(config, "CLIPVisionModel", class_token=True, pre_norm=True, patch_bias=False, pool="class")
    projection = {} if projection_dim is None else {"projection_dim": projection_dim}
    return VISION_DEFAULTS | sizes_of(config) | projection | {"model_type": "clip_vision_model"}


def to_text(config: Mapping[str, Any], where: str = "text_config") -> TextConfig:
    """CLIPTextConfig -> TextConfig. `eos_token_id` is kept as it is: 2 selects the older pooling rule."""
    c = TEXT_DEFAULTS | config
    note_training_only(c, where, "attention_dropout", 0.0)
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
        if not isinstance(c[key], int):
            raise HubError(f"{where}.{key} is {c[key]!r}; CLIP's text tower needs one token id")
    return TextConfig(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        mlp_dim=c["intermediate_size"],
        vocab_size=c["vocab_size"],
        max_length=c["max_position_embeddings"],
        activation=activation(c, where),
        layer_norm_eps=c["layer_norm_eps"],
        eos_token_id=c["eos_token_id"],
        pad_token_id=c["pad_token_id"],
        bos_token_id=c["bos_token_id"],
    )


def from_text(config: TextConfig, projection_dim: int | None = None) -> dict[str, Any]:
    """TextConfig -> CLIPTextConfig."""
    ids = {key: getattr(config, key) for key in ("eos_token_id", "pad_token_id", "bos_token_id")}
    sizes = {"vocab_size": config.vocab_size, "max_position_embeddings": config.max_length}
    return TEXT_DEFAULTS | _shared(config, projection_dim) | sizes | ids | {"model_type": "clip_text_model"}


def _shared(config: VitConfig | TextConfig, projection_dim: int | None) -> dict[str, Any]:
    shared = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": config.activation,
        "layer_norm_eps": config.layer_norm_eps,
    }
    return shared if projection_dim is None else shared | {"projection_dim": projection_dim}


def _half(config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of one tower, from its own config.json or from a whole CLIP's.

    OpenAI's own folders repeat it as `<name>_dict`, and CLIPConfig lets that copy win, its defaults included.
    """
    if config.get("model_type", "clip") != "clip":
        return dict(config)
    half = dict(config.get(name) or {})
    copy = config.get(f"{name}_dict")
    return half if copy is None else {**half, **defaults, **copy}


def vision_half(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the image tower, from its own config.json or from a whole CLIP's."""
    return _half(config, "vision_config", VISION_DEFAULTS)


def _text_half(config: Mapping[str, Any]) -> dict[str, Any]:
    return _half(config, "text_config", TEXT_DEFAULTS)


def _to_clip(config: Mapping[str, Any]) -> Clip:
    c = {"projection_dim": 512, "logit_scale_init_value": 2.6592} | config
    towers = to_vit(vision_half(config)), to_text(_text_half(config))
    return Clip(ClipConfig(*towers, c["projection_dim"], float(c["logit_scale_init_value"])))


def _from_clip(model: Clip) -> dict[str, Any]:
    c = model.config
    return {
        "model_type": "clip",
        "projection_dim": c.projection_dim,
        "logit_scale_init_value": c.logit_scale_init,
        "initializer_factor": 1.0,
        "vision_config": from_vit(c.image, c.projection_dim),
        "text_config": from_text(c.text, c.projection_dim),
    }


def _to_vision(config: Mapping[str, Any]) -> ClipVision:
    return ClipVision(to_vit(vision_half(config)))


def _to_text(config: Mapping[str, Any]) -> ClipText:
    return ClipText(to_text(_text_half(config)))


def _to_vision_projected(config: Mapping[str, Any]) -> ClipVision:
    half = vision_half(config)
    return ClipVision(to_vit(half), (VISION_DEFAULTS | half)["projection_dim"])


def _to_text_projected(config: Mapping[str, Any]) -> ClipText:
    half = _text_half(config)
    return ClipText(to_text(half), (TEXT_DEFAULTS | half)["projection_dim"])


# ---- families

CLIP = Family(
    architecture="CLIPModel",
    to_model=_to_clip,
    to_config=_from_clip,
    rows=lambda m: vision_rows(m.config.image) + text_rows(m.config.text) + head_rows(),
    names=Names(ignored=_BUFFERS),
    inputs=lambda m: example_inputs(m.config),
    within={},
    processor="CLIPProcessor",
    beside={"logit_bias": None},
)

# A tower alone is written as transformers 4 names it, `vision_model.encoder...`; transformers 5 writes
# `encoder...` and reads both.
_VISION_NAMES = Names(
    ((r"^(embeddings|pre_layrnorm|encoder|post_layernorm)\.", r"vision_model.\1."),), _BUFFERS
)
_TEXT_NAMES = Names(((r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),), _BUFFERS)
_NOT_VISION = (r"text_model\..*", r"text_projection\.weight", r"logit_scale")
_NOT_TEXT = (r"vision_model\..*", r"visual_projection\.weight", r"logit_scale")

VISION = Family(
    architecture="CLIPVisionModel",
    to_model=_to_vision,
    to_config=lambda m: from_vit(m.config),
    rows=lambda m: vision_rows(m.config),
    names=_VISION_NAMES,
    inputs=lambda m: {"pixel_values": np.zeros((1, *m.config.image_shape, 3), np.float32)},
    within={
        "CLIPModel": (*_NOT_VISION, r"visual_projection\.weight"),
        "CLIPVisionModelWithProjection": (r"visual_projection\.weight",),
        "CLIPForImageClassification": (r"classifier\..*",),
    },
    processor=None,
)
VISION_PROJECTED = VISION._replace(
    architecture="CLIPVisionModelWithProjection",
    to_model=_to_vision_projected,
    to_config=lambda m: from_vit(m.config, m.projection_dim),
    rows=lambda m: vision_rows(m.config) + linear("visual_projection", "visual_projection", bias=False),
    within={"CLIPModel": _NOT_VISION},
)
TEXT = Family(
    architecture="CLIPTextModel",
    to_model=_to_text,
    to_config=lambda m: from_text(m.config),
    rows=lambda m: text_rows(m.config),
    names=_TEXT_NAMES,
    inputs=lambda m: {"input_ids": np.zeros((1, m.config.max_length), np.int32)},
    within={
        "CLIPModel": (*_NOT_TEXT, r"text_projection\.weight"),
        "CLIPTextModelWithProjection": (r"text_projection\.weight",),
    },
    processor=None,
)
TEXT_PROJECTED = TEXT._replace(
    architecture="CLIPTextModelWithProjection",
    to_model=_to_text_projected,
    to_config=lambda m: from_text(m.config, m.projection_dim),
    rows=lambda m: text_rows(m.config) + linear("text_projection", "text_projection", bias=False),
    within={"CLIPModel": _NOT_TEXT},
)
