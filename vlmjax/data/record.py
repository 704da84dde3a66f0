"""One example on its way from a source to a batch: what every source returns."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Part = str | bytes | np.ndarray


@dataclass(frozen=True)
class Record:
    """An image with its captions, before decoding, cropping and tokenising.

    Attributes:
        key: what identifies the example in logs and error messages; stable between runs.
        image: an encoded file (JPEG, PNG, ...) as bytes, or pixels as a uint8 array `[height, width, 3]`. Empty bytes
            when the example is text alone; the first image when it has several.
        captions: the texts that describe the image; every one of them is a valid pair for it. Empty when nothing
            describes it by itself, as in a document or a conversation of several rounds.
        extra: whatever else the source knows (labels, boxes, questions); empty when it knows nothing. Two names have
            a fixed meaning: "conversations", a list of {"from": "human" | "gpt", "value": text} in order, where
            "<image>" in a text marks the place of an image; "images", a tuple of all images in the order of those
            marks, present only when there are several.
        parts: an interleaved document in reading order: texts as str, images as in `image`. Empty for all others.
    """

    key: str
    image: bytes | np.ndarray
    captions: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
