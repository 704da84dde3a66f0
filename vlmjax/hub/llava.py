"""LlavaForConditionalGeneration: an image tower of CLIP or SigLIP, one or two projections, and a language model.

Source of names and defaults: transformers, models/llava/{modeling_llava,configuration_llava}.py. Files come with three
generations of names; those that are written are the first, which every version of transformers and vLLM reads.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmjax.errors import HubError
from vlmjax.hub import clip, llama, siglip
from vlmjax.hub.family import Family, nearest
from vlmjax.hub.table import Names, Row, linear
from vlmjax.models.bridges import BridgeConfig
from vlmjax.models.decoder import DecoderConfig
from vlmjax.models.vit import VitConfig
from vlmjax.models.vlm import Vlm, VlmConfig, example_inputs
from vlmjax.ops.activations import ACTIVATIONS

DEFAULTS = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}
# The tower of a configuration that leaves it out: CLIP ViT-L/14 at 336 pixels.
_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
TOWERS = {
    "clip_vision_model": (clip.to_vit, clip.from_vit, clip.vision_rows),
    "siglip_vision_model": (siglip.to_siglip, siglip.from_siglip, siglip.siglip_rows),
}
DECODERS = {
    "llama": (llama.to_llama, llama.from_llama),
    "mistral": (llama.to_mistral, llama.from_mistral),
    "qwen2": (llama.to_qwen2, llama.from_qwen2),
}
# Our own key: this folder's one projection is written as two, the second of which is the identity.
LINEAR_KEY = "vlmjax_bridge"
_HEAD, _TABLE = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
_IN_MEMORY = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.vision_model.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
_SECOND = "multi_modal_projector.linear_2"


# ---- configurations


def to_llava(config: Mapping[str, Any]) -> VlmConfig:
    """LlavaConfig -> VlmConfig."""
    c = DEFAULTS | config
    vision = _TOWER if not c.get("vision_config") else c["vision_config"]
    words = {"model_type": "llama", **(c.get("text_config") or {})}
    words["tie_word_embeddings"] = words.get("tie_word_embeddings", c["tie_word_embeddings"])
    to_tower = _part(TOWERS, vision.get("model_type", "clip_vision_model"), "vision_config")[0]
    to_decoder = _part(DECODERS, words["model_type"], "text_config")[0]
    layers, strategy = c["vision_feature_layer"], c["vision_feature_select_strategy"]
    if strategy not in ("default", "full"):
        raise HubError(f"vision_feature_select_strategy is {strategy!r}; supported: default, full")
    act = c["projector_hidden_act"]
    if act not in ACTIVATIONS:
        raise HubError(f"projector_hidden_act is {act!r}; {nearest(str(act), ACTIVATIONS)}")
    bias = bool(c["multimodal_projector_bias"])
    single = c.get(LINEAR_KEY) == "linear"
    bridge = BridgeConfig("linear", 1, bias=bias) if single else BridgeConfig("mlp", 2, act, bias)
    image = to_tower(vision, "vision_config")
    if strategy == "default" and not image.class_token:
        raise HubError(
            "vision_feature_select_strategy 'default' drops a class token, which this tower has not"
        )
    return VlmConfig(
        image=image,
        text=to_decoder(words, "text_config"),
        bridge=bridge,
        image_token_id=c.get("image_token_id") or c["image_token_index"],
        feature_layers=(layers,) if isinstance(layers, int) else tuple(layers),
        keep_class=strategy == "full" and image.class_token,
    )


def _part(known: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in known:
        raise HubError(f"{where}.model_type is {name!r}; {nearest(name, known)}")
    return known[name]


def from_llava(config: VlmConfig) -> dict[str, Any]:
    """VlmConfig -> LlavaConfig."""
    bridge, layers = config.bridge, config.feature_layers
    if bridge.projections not in (1, 2):
        raise HubError(
            f"LlavaForConditionalGeneration has one hidden projection; the bridge is {bridge.kind!r} of "
            f"{bridge.projections} projections"
        )
    if config.text.family not in DECODERS:
        raise HubError(
            f"no LlavaForConditionalGeneration here with a language model like {config.text.family}"
        )
    single = bridge.projections == 1
    full = config.keep_class or not config.image.class_token
    words = DECODERS[config.text.family][1](config.text)
    return {
        "model_type": "llava",
        "vision_config": TOWERS[tower_of(config.image)][1](config.image),
        "text_config": words,
        "image_token_index": config.image_token_id,
        "image_seq_length": config.image_tokens,
        "projector_hidden_act": "linear" if single else bridge.activation,
        "multimodal_projector_bias": bridge.bias,
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
        "vision_feature_select_strategy": "full" if full else "default",
        "tie_word_embeddings": config.text.tied,
        "pad_token_id": config.text.pad_token_id,
        **({LINEAR_KEY: "linear"} if single else {}),
    }


def tower_of(config: VitConfig) -> str:
    """Which class a tower is written as."""
    return "clip_vision_model" if config.class_token else "siglip_vision_model"


# ---- tables


def vlm_rows(config: VlmConfig) -> list[Row]:
    """Rows of the three parts."""
    tower = TOWERS[tower_of(config.image)][2]
    rows = tower(config.image, "vision_tower.vision_model", "vision_model")
    for i in range(1, config.bridge.projections + 1):
        name = f"linear_{i}"
        rows += linear(f"multi_modal_projector.{name}", f"bridge/{name}", bias=config.bridge.bias)
    return rows + decoder_rows(config.text)


def decoder_rows(config: DecoderConfig) -> list[Row]:
    """Rows of the language model."""
    return [row.under("language_model.", "language_model/") for row in llama.decoder_rows(config)]


def constants(config: VlmConfig) -> dict[str, np.ndarray]:
    """What the file holds besides, where the class has two projections and the model one: the identity after it."""
    if config.bridge.projections != 1:
        return {}
    width = config.text.width
    identity = {f"{_SECOND}.weight": np.eye(width, dtype=np.float32)}
    return identity | ({f"{_SECOND}.bias": np.zeros(width, np.float32)} if config.bridge.bias else {})


def in_memory(name: str) -> str:
    """A tensor's name in transformers 5, where language model and tower lie beside each other and the head above."""
    for file, memory in _IN_MEMORY.items():
        if name.startswith(file):
            return memory + name.removeprefix(file)
    raise HubError(f"{name} is no tensor of LlavaForConditionalGeneration")


LLAVA = Family(
    architecture="LlavaForConditionalGeneration",
    to_model=lambda config: Vlm(to_llava(config)),
    to_config=lambda m: from_llava(m.config),
    rows=lambda m: vlm_rows(m.config),
    names=Names(
        (
            (r"^model\.language_model\.(?!model\.|lm_head\.)", "language_model.model."),
            (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
        ),
        (
            r"vision_tower\.vision_model\.embeddings\.position_ids",
            r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        ),
    ),
    inputs=lambda m: example_inputs(m.config),
    within={},
    processor="LlavaProcessor",
    copies=lambda m: {_HEAD: _TABLE} if m.config.text.tied else {},
    constants=lambda m: constants(m.config),
    in_memory=in_memory,
)
