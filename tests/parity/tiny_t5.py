"""Tiny T5s of awkward sizes in transformers: heads that are not as wide as the model together, few buckets."""

from typing import Any

import numpy as np
import tiny_blip
import torch
import transformers

VOCAB, PAD, END = 73, 0, 1
SIZES = {
    "vocab_size": VOCAB, "d_model": 26, "d_kv": 7, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 3,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": PAD,
    "pad_token_id": PAD, "eos_token_id": END,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "flan: gelu_new, a head of its own": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "version 1.0: relu, tied and scaled, two layers and one": {"feed_forward_proj": "relu", "num_decoder_layers": 1},
    # With more layers that write than read transformers computes, but cannot generate.
    "blip-2: gelu, two layers and three": {
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dense_act_fn": "gelu",
        "num_decoder_layers": 3,
    },
}  # fmt: skip


def config(name: str) -> Any:
    return transformers.T5Config(**(SIZES | CASES[name]))


def untie(model: Any, seed: int = 0) -> Any:
    """The head of version 1.1 is its own; transformers ties it when it builds one."""
    if not model.config.scale_decoder_outputs:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(model.lm_head.weight.shape, generator=generator)
        model.lm_head.weight = torch.nn.Parameter(0.3 * drawn)
    return model


def model(name: str, seed: int = 1) -> Any:
    return redraw(transformers.T5ForConditionalGeneration(config(name)), seed)


def redraw(model: Any, seed: int = 0) -> Any:
    """With words that weigh as much as what is added to them: a T5 that says one word for ever tells little.

    Queries are as small as T5 draws them: scores are not scaled, and a softmax of large ones loses digits.
    """
    tiny_blip.redraw(model, seed)
    with torch.no_grad():
        model.shared.weight.mul_(4.0)
        for name, parameter in model.named_parameters():
            if name.endswith(".q.weight"):
                parameter.mul_(model.config.d_kv**-0.5)
    return untie(model)


def texts(side: str = "right") -> dict[str, np.ndarray]:
    """Rows of 20, 7 and 3 tokens, the longest beyond the last distance, each closed."""
    rng = np.random.default_rng(3)
    ids, mask = np.full((3, 20), PAD, np.int32), np.zeros((3, 20), np.int32)
    for row, count in enumerate((20, 7, 3)):
        at = slice(0, count) if side == "right" else slice(20 - count, 20)
        ids[row, at], mask[row, at] = [*rng.integers(2, VOCAB, count - 1), END], 1
    return {"input_ids": ids, "attention_mask": mask}


def labels() -> np.ndarray:
    """Answers of 15, 3 and 8 tokens."""
    rng = np.random.default_rng(4)
    out = np.full((3, 15), -100, np.int32)
    for row, count in enumerate((15, 3, 8)):
        out[row, :count] = [*rng.integers(2, VOCAB, count - 1), END]
    return out
