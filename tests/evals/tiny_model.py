"""A tiny dual encoder as a Hugging Face folder, and shards of pictures to score it on."""

import io
import tarfile

import jax
import numpy as np
from PIL import Image

from vlmjax import hub
from vlmjax.data import bpe, text
from vlmjax.data.images import EvalTransform
from vlmjax.models.clip import Clip, ClipConfig, example_inputs
from vlmjax.models.text import TextConfig
from vlmjax.models.vit import VitConfig

NAMES = ["cat", "dog", "grey seal", "seal"]


def write_model(folder) -> None:
    """A random model with its tokenizer and image processor."""
    words = str(folder) + "-words"
    bpe.train_bpe([f"a photo of a {name}." for name in NAMES], 540, words)
    tokenizer = text.load(words, 16)
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    shape = {"width": 16, "depth": 1, "heads": 2, "mlp_dim": 32}
    image = VitConfig(**shape, image_size=16, patch_size=8)
    words = TextConfig(**shape, vocab_size=tokenizer.vocab_size, max_length=16, **ids)
    model = Clip(ClipConfig(image=image, text=words, projection_dim=8))
    params = model.init(jax.random.key(3), **example_inputs(model.config))["params"]
    processor = EvalTransform(size=16, crop=(16, 16))
    hub.save(model, params, folder, tokenizer=tokenizer, image_processor=processor)


def pixels(i: int) -> np.ndarray:
    """Picture i of the shards, of varied shape and colour."""
    rng = np.random.default_rng(i)
    base = rng.integers(0, 256, (1, 1, 3))
    return np.clip(base + rng.integers(-60, 60, (17 + i % 5, 24 - i % 4, 3)), 0, 255).astype(np.uint8)


def write_shard(path, captions, *, damaged=(), labels=None) -> None:
    """A tar of PNG pictures with one caption each, some of them not pictures at all."""
    with tarfile.open(path, "w") as tar:
        for i, caption in enumerate(captions):
            buffer = io.BytesIO()
            Image.fromarray(pixels(i)).save(buffer, "PNG")
            files = {"png": b"no picture" if i in damaged else buffer.getvalue(), "txt": caption.encode()}
            if labels is not None:
                files["cls"] = str(labels[i]).encode()
            for extension, data in files.items():
                entry = tarfile.TarInfo(f"{i:04d}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
