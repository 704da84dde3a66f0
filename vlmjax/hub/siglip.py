"""SiglipVisionModel: SigLIP's image tower.

Source of names and defaults: transformers, models/siglip/{modeling_siglip,configuration_siglip}.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmjax.hub.clip import block_rows, sizes_of, tower
from vlmjax.hub.family import Family, only
from vlmjax.hub.table import LINEAR, Names, Row, linear, norm, patches
from vlmjax.models.clip import ClipVision
from vlmjax.models.vit import VitConfig

# What a key means where a configuration leaves it out.
DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "vision_use_head": True,
}
# How SigLIP's tower differs from CLIP's.
FORM = {"class_token": False, "pre_norm": False, "patch_bias": True}


def siglip_rows(config: VitConfig, hf: str = "vision_model", path: str = "vision_model") -> list[Row]:
    """Rows of the image tower."""
    ours, theirs = f"{path}/embeddings", f"{hf}.embeddings"
    rows = [
        Row(f"{theirs}.patch_embedding.weight", f"{ours}/patch_embedding/kernel", patches(config.patch_size)),
        Row(f"{theirs}.patch_embedding.bias", f"{ours}/patch_embedding/bias"),
        Row(f"{theirs}.position_embedding.weight", f"{ours}/position_embedding"),
        *block_rows(hf, path, config.depth),
        *norm(f"{hf}.post_layernorm", f"{path}/post_layernorm"),
    ]
    if config.pool == "attention":
        head, pooled = f"{hf}.head", f"{path}/head"
        rows += [
            Row(f"{head}.probe", f"{pooled}/probe"),
            Row(f"{head}.attention.in_proj_weight", f"{pooled}/in_proj", LINEAR),
            Row(f"{head}.attention.in_proj_bias", f"{pooled}/in_proj_bias"),
            *linear(f"{head}.attention.out_proj", f"{pooled}/out_proj"),
            *norm(f"{head}.layernorm", f"{pooled}/layernorm"),
            *linear(f"{head}.mlp.fc1", f"{pooled}/mlp/fc1"),
            *linear(f"{head}.mlp.fc2", f"{pooled}/mlp/fc2"),
        ]
    return rows


def to_siglip(config: Mapping[str, Any], where: str = "vision_config") -> VitConfig:
    """SiglipVisionConfig -> VitConfig."""
    c = DEFAULTS | config
    return tower(c, where, pool="attention" if c["vision_use_head"] else "none", **FORM)


def from_siglip(config: VitConfig) -> dict[str, Any]:
    """VitConfig -> SiglipVisionConfig."""
    only(config, "SiglipVisionModel", **FORM)
    head = {"vision_use_head": config.pool == "attention"}
    return DEFAULTS | sizes_of(config) | head | {"model_type": "siglip_vision_model"}


VISION = Family(
    architecture="SiglipVisionModel",
    to_model=lambda config: ClipVision(to_siglip(config.get("vision_config") or config)),
    to_config=lambda m: from_siglip(m.config),
    rows=lambda m: siglip_rows(m.config),
    names=Names(
        ((r"^(embeddings|encoder|post_layernorm|head)\.", r"vision_model.\1."),),
        (r"vision_model\.embeddings\.position_ids",),
    ),
    inputs=lambda m: {"pixel_values": np.zeros((1, *m.config.image_shape, 3), np.float32)},
    within={"SiglipModel": (r"text_model\..*", r"logit_scale", r"logit_bias")},
    processor=None,
)
