"""Tiny configs of awkward shape (three and five heads, a non-square grid) and parameters that leave nothing at zero."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vlmjax.models.bert import BertConfig
from vlmjax.models.clip import ClipConfig
from vlmjax.models.text import TextConfig
from vlmjax.models.vit import VitConfig

VIT = VitConfig(width=40, depth=3, heads=5, mlp_dim=56, image_size=(16, 24), patch_size=8)
TEXT = TextConfig(width=24, depth=2, heads=3, mlp_dim=48, vocab_size=50, max_length=9, eos_token_id=49)
BERT = BertConfig(width=24, depth=2, heads=3, mlp_dim=48, vocab_size=50, max_length=9)
CLIP = ClipConfig(image=VIT, text=TEXT, projection_dim=12)
DUAL = ClipConfig(image=VIT, text=BERT, projection_dim=12)

IDS = np.array([[48, 3, 4, 49, 0, 0, 0], [48, 5, 6, 7, 8, 9, 49], [48, 49, 2, 49, 1, 0, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1, 0, 0, 0], [1] * 7, [1, 1, 1, 1, 1, 0, 0]], np.int32)


def images(batch=2, height=16, width=24):
    """Standard normal pixels."""
    return np.random.default_rng(7).normal(size=(batch, height, width, 3)).astype(np.float32)


def make_params(model, *inputs, seed=0, **named):
    """Random parameters of the model's shapes (nothing is compiled); no bias or scale is at its start."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **named))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        spread = leaf.shape[-2] ** -0.5 if name == "kernel" else 0.2
        return jnp.asarray((name == "scale") + spread * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def change(config, **fields):
    """The config with some fields replaced."""
    return dataclasses.replace(config, **fields)
