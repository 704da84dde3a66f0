"""Rows of a labelled set: an image and the number of its class."""

from typing import Any

import numpy as np

from vlmjax.data import images, loader, plan
from vlmjax.data.examples import Made, RowExamples
from vlmjax.data.labels import Classes
from vlmjax.data.loader import Batch
from vlmjax.data.sources import Source


class LabelledExamples(RowExamples):
    """Fills rows of batches with labelled images; a record of no known class cannot be used.

    A batch is a dict of arrays over this host's rows:

        pixel_values      uint8 [b, h, w, 3]
        label             int32 [b]
        valid             bool [b]
        key               object [b]
    """

    def __init__(
        self,
        source: Source,
        image_transform: Any,
        tokenizer: None,
        kind: Classes,
        *,
        seed: int = 0,
        clean: str = "",
        background: tuple[int, int, int] = (255, 255, 255),
        max_pixels: int = images.MAX_PIXELS,
        cache_decoded: int | None = None,
        cache_bytes: int = 2 << 30,
    ):
        """See `pipeline.TrainData`; there are no texts to be clean."""
        reading = {"background": background, "max_pixels": max_pixels, "lazy": cache_decoded is None}
        super().__init__(source, image_transform, tokenizer, seed=seed, **reading)
        self._classes = kind
        self._pixels = loader.Pixels(cache_decoded, cache_bytes, self._decode)

    def empty(self, rows: int, chunk: plan.Chunk | None = None) -> Batch:
        """A batch of zeros, every row invalid."""
        return {
            "pixel_values": np.zeros((rows, *self._transform.output_size, 3), np.uint8),
            "label": np.zeros(rows, np.int32),
            "valid": np.zeros(rows, bool),
            "key": np.full(rows, "", object),
        }

    def _example(self, index: int, position: int) -> Made:
        pixels, record, size = self._pixels(self.source, index)
        label = np.int32(self._classes.of(record))
        pixels = self._transform(pixels, self._generators.at(position))
        return Made({"pixel_values": pixels, "label": label}, "", record.key, size)

    def _tokenize(self, said: list[str], out: Batch) -> int:
        return 0
