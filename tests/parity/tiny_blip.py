"""Tiny BLIPs of awkward sizes in transformers, every parameter re-drawn, and inputs of both sides.

transformers starts BLIP's image tower at 1e-10: a model that is not drawn anew does not see its image.
"""

from typing import Any

import numpy as np
import tiny
import torch
import transformers

VOCAB, PAD, SEP, DEC, ENC = 61, 0, 7, 58, 59
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 40, "bos_token_id": DEC, "eos_token_id": 2, "sep_token_id": SEP, "pad_token_id": PAD,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "label_smoothing": 0.1,
}  # fmt: skip
VISION = {
    "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 20,
    "patch_size": 4, "layer_norm_eps": 1e-6,
}  # fmt: skip


def config(**text: Any) -> Any:
    return transformers.BlipConfig(text_config=TEXT | text, vision_config=VISION, image_text_hidden_size=10)


def redraw(model: Any, seed: int = 0) -> Any:
    """Wide enough that words and images decide what comes out."""
    generator, drawn = torch.Generator().manual_seed(seed), set()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.data_ptr() in drawn:
                continue  # tied: another name has drawn it
            drawn.add(parameter.data_ptr())
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + name.endswith("weight"))
            else:
                # A flat choice of words: otherwise one is repeated for ever.
                spread = 0.3 if "embed" in name else 1.5 * parameter[0].numel() ** -0.5
                parameter.copy_(spread * noise)
    return model.eval()


def captioner(seed: int = 0) -> Any:
    return redraw(transformers.BlipForConditionalGeneration(config()), seed)


def retriever(seed: int = 3) -> Any:
    return redraw(transformers.BlipForImageTextRetrieval(config()), seed)


def answerer(seed: int = 4) -> Any:
    """The class has one text configuration for both ends, so states of questions are as wide as those of images."""
    return redraw(transformers.BlipForQuestionAnswering(config(hidden_size=36, num_attention_heads=3)), seed)


def images(batch: int = 3, height: int = 20, width: int = 20) -> np.ndarray:
    return tiny.pixels(batch, height, width)


def texts(side: str = "right", first: int = DEC) -> dict[str, np.ndarray]:
    """Three texts of 5, 4 and 7 tokens that begin with `first` and end with [SEP]."""
    rng = np.random.default_rng(5)
    rows = [[first, *rng.integers(10, 57, n).tolist(), SEP] for n in (3, 2, 5)]
    ids, mask = np.full((3, 7), PAD, np.int32), np.zeros((3, 7), np.int32)
    for row, tokens in enumerate(rows):
        at = slice(0, len(tokens)) if side == "right" else slice(7 - len(tokens), 7)
        ids[row, at], mask[row, at] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}


def smoothed(scores: Any, labels: np.ndarray, smoothing: float = 0.1) -> Any:
    """Mean cross-entropy of the next token with label smoothing; labels of -100 do not count."""
    import jax
    import jax.numpy as jnp

    logs, wanted = jax.nn.log_softmax(scores[:, :-1]), labels[:, 1:]
    right = jnp.take_along_axis(logs, jnp.maximum(wanted, 0)[..., None], axis=2)[..., 0]
    each = -(1 - smoothing) * right - smoothing * logs.mean(axis=-1)
    return jnp.where(wanted >= 0, each, 0.0).sum() / float((wanted >= 0).sum())
