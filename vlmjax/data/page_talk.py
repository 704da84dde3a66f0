"""What `inspect` shows of rows of conversations: their words, with what the model learns to write between { and }."""

from itertools import groupby

import numpy as np

from vlmjax.data.loader import Batch
from vlmjax.data.text import Tokenizer


def lines_of(batch: Batch, tokenizer: Tokenizer, image_tokens: int) -> list[str]:
    """A few lines for each row of a batch from `generative.GenerativeExamples`.

    Args:
        batch: rows as the step gets them.
        tokenizer: theirs.
        image_tokens: of one image.

    Returns:
        for each row its records, tokens and images, then each conversation with its control tokens; an image as
        `[image 0: 576]`, its slot and its tokens.
    """
    out, capacity = [], batch["input_ids"].shape[1]
    for row in range(len(batch["valid"])):
        segments = batch["segment_ids"][row]
        images = int(batch["image_valid"][row].sum())
        learned = int((batch["target_weights"][row] > 0).sum())
        out.append(
            f"row {row}: {batch['key'][row] or 'nothing'} | {int((segments > 0).sum())} of {capacity} tokens, "
            f"{learned} to be learned, {images} images"
        )
        for number in dict.fromkeys(segments[segments > 0].tolist()):
            out.append("  " + _shown(batch, row, np.flatnonzero(segments == number), tokenizer, image_tokens))
    return out


def _shown(batch: Batch, row: int, places: np.ndarray, tokenizer: Tokenizer, image_tokens: int) -> str:
    """One conversation: runs of tokens with the same loss, and of the same image."""
    index = batch["image_index"][row, places]
    # The weight of a token as a target stands at the token before it.
    weights = np.concatenate([[0.0], batch["target_weights"][row, places[:-1]]])
    slot = np.where(index >= 0, index // image_tokens, -1)
    text = ""
    for (which, learned), run in groupby(range(len(places)), key=lambda k: (int(slot[k]), bool(weights[k]))):
        ids = batch["input_ids"][row, places[list(run)]].tolist()
        words = (
            f"[image {which}: {len(ids)}]"
            if which >= 0
            else tokenizer.backend.decode(ids, skip_special_tokens=False).replace("</w>", " ")
        )
        text += "{" + words + "}" if learned else words
    return text.replace("\n", "\\n")
