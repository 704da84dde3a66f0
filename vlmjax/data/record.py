"""One example on its way from a source to a batch: what every source returns."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Record:
    """An image with its captions, before decoding, cropping and tokenising.

    Attributes:
        key: what identifies the example in logs and error messages; stable between runs.
        image: an encoded file (JPEG, PNG, ...) as bytes, or pixels as a uint8 array `[height, width, 3]`.
        captions: the texts that describe the image; every one of them is a valid pair for it.
        extra: whatever else the source knows (labels, boxes, questions); empty when it knows nothing.
    """

    key: str
    image: bytes | np.ndarray
    captions: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)
