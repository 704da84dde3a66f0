"""ViTModel: an image tower of the Vision Transformer (2010.11929) or DeiT, with which BLIP begins.

Source of names and defaults: transformers, models/vit/{modeling_vit,configuration_vit}.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmjax.hub.clip import sizes_of, tower
from vlmjax.hub.family import Family, note_training_only, only, require
from vlmjax.hub.table import Names, Row, batched, linear, norm, patches
from vlmjax.models.clip import ClipVision
from vlmjax.models.vit import VitConfig

# What a key means where a configuration leaves it out.
DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}
# How it differs from CLIP's tower: its states are all normalised, the class token's is the first of them.
FORM = {"class_token": True, "pre_norm": False, "patch_bias": True, "pool": "none"}


def vit_rows(config: VitConfig) -> list[Row]:
    """Rows of the tower."""
    ours, path, hf = "vision_model/embeddings", "vision_model/encoder/layers", "encoder.layer.{layer}"
    kernel, layers = "embeddings.patch_embeddings.projection", config.depth
    rows = [
        Row("embeddings.cls_token", f"{ours}/class_embedding", batched(2)),
        Row("embeddings.position_embeddings", f"{ours}/position_embedding", batched(1)),
        Row(f"{kernel}.weight", f"{ours}/patch_embedding/kernel", patches(config.patch_size)),
        Row(f"{kernel}.bias", f"{ours}/patch_embedding/bias"),
        *norm(f"{hf}.layernorm_before", f"{path}/layer_norm1", layers=layers),
        *norm(f"{hf}.layernorm_after", f"{path}/layer_norm2", layers=layers),
    ]
    names = {f"attention.attention.{name}": f"self_attn/{name[0]}_proj" for name in ("query", "key", "value")}
    names |= {"attention.output.dense": "self_attn/out_proj"}
    names |= {"intermediate.dense": "mlp/fc1", "output.dense": "mlp/fc2"}
    for theirs, own in names.items():
        rows += linear(f"{hf}.{theirs}", f"{path}/{own}", layers=layers)
    return rows + norm("layernorm", "vision_model/post_layernorm")


def to_vit(config: Mapping[str, Any]) -> VitConfig:
    """ViTConfig of transformers -> ours."""
    c = DEFAULTS | config
    require(c, "config.json: vit", qkv_bias=True)
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        note_training_only(c, "config.json: vit", key, 0.0)
    return tower(c | {"attention_dropout": 0.0}, "config.json: vit", init="normal", **FORM)


def from_vit(config: VitConfig) -> dict[str, Any]:
    """Ours -> ViTConfig of transformers."""
    only(config, "ViTModel", **FORM)
    sizes = {key: value for key, value in sizes_of(config).items() if key in DEFAULTS}
    return DEFAULTS | sizes | {"model_type": "vit"}


VISION = Family(
    architecture="ViTModel",
    to_model=lambda config: ClipVision(to_vit(config)),
    to_config=lambda m: from_vit(m.config),
    rows=lambda m: vit_rows(m.config),
    # A pooler is made of no picture's training here: BLIP and all others leave it behind.
    names=Names(((r"^(vit|deit)\.", ""),), (r"pooler\.dense\.(weight|bias)",)),
    inputs=lambda m: {"pixel_values": np.zeros((1, *m.config.image_shape, 3), np.float32)},
    within={
        "ViTForImageClassification": (r"classifier\..*",),
        "ViTForMaskedImageModeling": (r"decoder\..*", r"embeddings\.mask_token"),
    },
    processor=None,
)
