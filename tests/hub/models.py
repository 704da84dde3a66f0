"""Tiny models of every family with random parameters, for the tests of this folder."""

import functools
from typing import Any

import jax
import numpy as np

from vlmjax.hub import folder
from vlmjax.models.bert import Bert, BertConfig
from vlmjax.models.clip import Clip, ClipConfig, ClipText, ClipVision
from vlmjax.models.text import TextConfig
from vlmjax.models.vit import VitConfig

IMAGE = VitConfig(width=20, depth=2, heads=5, mlp_dim=28, image_size=24, patch_size=8, activation="gelu")
TEXT = TextConfig(
    width=12, depth=3, heads=3, mlp_dim=20, vocab_size=70, max_length=16, eos_token_id=1, bos_token_id=0, pad_token_id=1
)  # fmt: skip
BERT = BertConfig(width=12, depth=2, heads=3, mlp_dim=20, vocab_size=50, max_length=16, pad_token_id=-1)

MODELS = {
    "CLIPModel": Clip(ClipConfig(IMAGE, TEXT, 10)),
    "CLIPVisionModel": ClipVision(IMAGE),
    "CLIPVisionModelWithProjection": ClipVision(IMAGE, 10),
    "CLIPTextModel": ClipText(TEXT),
    "CLIPTextModelWithProjection": ClipText(TEXT, 10),
    "BertModel": Bert(BERT),
    "VisionTextDualEncoderModel": Clip(ClipConfig(IMAGE, BERT, 10)),
}


@functools.cache
def params_of(name: str) -> dict[str, Any]:
    """Random numpy parameters, every one different."""
    model = MODELS[name]
    rng = np.random.default_rng(len(name))
    shapes = folder.abstract_params(folder.family_of(model), model)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def same(a: Any, b: Any) -> bool:
    """Bit for bit, with the same structure and dtypes."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)
