"""Tiny BLIP-2s of awkward sizes in transformers, every parameter re-drawn, and inputs of both sides.

transformers starts the tower at 1e-10 and the queries at 0: a model that is not drawn anew sees no image.
"""

from typing import Any

import numpy as np
import tiny
import tiny_blip
import transformers

VOCAB, PAD, SEP, CLS, DEC, QUERIES = 53, 0, 7, 3, 52, 5
VISION = {
    "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 15,
    "patch_size": 5, "qkv_bias": True, "layer_norm_eps": 1e-6,
}  # fmt: skip
# Three layers: a whole group of two, and one that looks at the image alone.
QFORMER = {
    "vocab_size": VOCAB, "hidden_size": 28, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 44,
    "max_position_embeddings": 17, "cross_attention_frequency": 2, "pad_token_id": PAD,
}  # fmt: skip


def config(*, text: bool = False, language: dict[str, Any] | None = None, **rest: Any) -> Any:
    qformer = QFORMER | {"use_qformer_text_input": text}
    words = {} if language is None else {"text_config": language}
    sizes = {"num_query_tokens": QUERIES, "image_text_hidden_size": 9}
    return transformers.Blip2Config(vision_config=VISION, qformer_config=qformer, **words, **sizes, **rest)


def retriever(seed: int = 7) -> Any:
    return tiny_blip.redraw(transformers.Blip2ForImageTextRetrieval(config(text=True)), seed)


def images(batch: int = 3, height: int = 15, width: int = 15) -> np.ndarray:
    return tiny.pixels(batch, height, width)


def texts(side: str = "right", first: int = CLS) -> dict[str, np.ndarray]:
    """Three texts of 5, 4 and 7 tokens that begin with `first` and end with [SEP]."""
    rng = np.random.default_rng(5)
    rows = [[first, *rng.integers(10, 50, n).tolist(), SEP] for n in (3, 2, 5)]
    ids, mask = np.full((3, 7), PAD, np.int32), np.zeros((3, 7), np.int32)
    for row, tokens in enumerate(rows):
        at = slice(0, len(tokens)) if side == "right" else slice(7 - len(tokens), 7)
        ids[row, at], mask[row, at] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}
