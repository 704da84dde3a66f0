"""Small random language models in transformers and here, and batches of prompts of different lengths."""

import functools
import tempfile

import numpy as np
import torch
import transformers

from tests.parity import tiny
from vlmjax import hub

VOCAB, PAD = 61, 3
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": PAD,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "llama": (
        transformers.LlamaForCausalLM, transformers.LlamaConfig,
        SMALL | {"intermediate_size": 52, "num_key_value_heads": 2},
    ),
    "mistral": (
        transformers.MistralForCausalLM, transformers.MistralConfig,
        SMALL | {"intermediate_size": 52, "num_key_value_heads": 2, "sliding_window": 5},
    ),
    "opt": (transformers.OPTForCausalLM, transformers.OPTConfig, SMALL | {"ffn_dim": 52}),
}  # fmt: skip


@functools.cache
def pair(name: str, seed: int = 0):
    """(transformers' model, ours, its parameters)."""
    cls, config, sizes = MODELS[name]
    theirs = tiny.redraw(cls(config(**sizes)), seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, *hub.load(folder)


def prompts(seed: int = 0, side: str = "left") -> dict[str, np.ndarray]:
    """Rows of 9, 5 and 2 tokens; other seeds, other tokens."""
    ids = np.random.default_rng(seed).integers(4, VOCAB, (3, 9)).astype(np.int32)
    mask = (np.arange(9)[None, :] >= np.array([[0], [4], [7]])).astype(np.int32)
    ids = np.where(mask == 1, ids, PAD).astype(np.int32)
    if side == "right":
        ids, mask = (
            np.stack([np.roll(row, -n) for row, n in zip(x, (0, 4, 7), strict=True)]) for x in (ids, mask)
        )
    return {"input_ids": ids, "attention_mask": mask}


def expected(theirs, inputs: dict[str, np.ndarray], new: int, **options) -> np.ndarray:
    """New tokens by transformers, padded to `new` of them."""
    options = {"do_sample": False, "pad_token_id": PAD, "eos_token_id": None} | options
    theirs.generation_config.eos_token_id = options["eos_token_id"]
    out = theirs.generate(**tiny.to_torch(inputs), max_new_tokens=new, **options)
    out = out[:, inputs["input_ids"].shape[1] :].numpy()
    return np.pad(out, ((0, 0), (0, new - out.shape[1])), constant_values=PAD)


def full_logits(theirs, ids: list[int]) -> np.ndarray:
    """Logits of one whole text without padding or cache."""
    with torch.no_grad():
        return theirs(input_ids=torch.tensor([ids])).logits[0].numpy()
