"""Tiny transformers models with every parameter re-drawn, so that no zero, one or symmetry hides a mistake."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

torch.set_num_threads(2)

# eos_token_id=2 selects the older pooling rule (the largest id of the row); any other id is looked for.
CLIPS: dict[str, dict[str, Any]] = {
    "quick_gelu, largest id, 5 heads of 8": {
        "vision": {
            "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 5,
            "image_size": 42, "patch_size": 14, "hidden_act": "quick_gelu",
        },
        "text": {
            "hidden_size": 24, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 3,
            "vocab_size": 99, "max_position_embeddings": 16, "hidden_act": "quick_gelu",
            "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1,
        },
        "projection_dim": 20,
    },
    "gelu, given id, 3 heads of 12 and 7 of 4": {
        "vision": {
            "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": 32, "patch_size": 8, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        },
        "text": {
            "hidden_size": 28, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 7,
            "vocab_size": 61, "max_position_embeddings": 13, "hidden_act": "gelu", "layer_norm_eps": 1e-3,
            "eos_token_id": 7, "bos_token_id": 6, "pad_token_id": 7,
        },
        "projection_dim": 11,
    },
}  # fmt: skip
BERT = {
    "hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 5, "vocab_size": 83,
    "max_position_embeddings": 18, "type_vocab_size": 3, "pad_token_id": 4,
}  # fmt: skip


def redraw(model: Any, seed: int = 0) -> Any:
    """Draw every parameter anew: norms around one, the rest wide enough that every path matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            is_scale = ("norm" in name.lower() or "layrnorm" in name) and name.endswith("weight")
            parameter.copy_(1.0 + noise if is_scale or name == "logit_scale" else noise)
    return model.eval()


def clip_config(name: str) -> Any:
    case = CLIPS[name]
    dim = case["projection_dim"]
    return transformers.CLIPConfig(
        vision_config=case["vision"] | {"projection_dim": dim},
        text_config=case["text"] | {"projection_dim": dim},
        projection_dim=dim,
    )


def clip(name: str) -> Any:
    return redraw(transformers.CLIPModel(clip_config(name)))


def bert(**changes: Any) -> Any:
    return redraw(transformers.BertModel(transformers.BertConfig(**(BERT | changes))))


def dual_encoder() -> Any:
    vision = transformers.CLIPVisionConfig(**next(iter(CLIPS.values()))["vision"])
    config = transformers.VisionTextDualEncoderConfig(
        vision_config=vision.to_dict(),
        text_config=transformers.BertConfig(**BERT).to_dict(),
        projection_dim=14,
    )
    return redraw(transformers.VisionTextDualEncoderModel(config))


def folder_of(model: Any, path: Path, **kwargs: Any) -> Path:
    """Save as transformers saves."""
    model.save_pretrained(path, **kwargs)
    return path


def pixels(batch: int, height: int, width: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, height, width, 3)).astype(np.float32)


def texts(batch: int, length: int, vocab: int, eos: int, seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of rows of different lengths: words, the end-of-text id twice, then padding with that id."""
    rng = np.random.default_rng(seed)
    ids = np.full((batch, length), eos, np.int32)
    mask = np.zeros((batch, length), np.int32)
    for row in range(batch):
        words = 2 + (row * 3) % (length - 4)
        ids[row, :words] = rng.integers(10, vocab - 2, words)
        mask[row, : words + 1] = 1
    return ids, mask


def to_torch(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Hugging Face's form of the same inputs: channels first, int64 ids."""
    out = {}
    for name, value in inputs.items():
        value = value.transpose(0, 3, 1, 2) if name == "pixel_values" else value.astype(np.int64)
        out[name] = torch.from_numpy(np.ascontiguousarray(value))
    return out
