"""One example of a training batch: record, pixels, caption and tokens, as a function of (source, seed, position)."""

import functools
import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmjax.data import images, loader, plan
from vlmjax.data.captions import CaptionRule, Text
from vlmjax.data.loader import Batch, Done, Failure
from vlmjax.data.record import Record
from vlmjax.data.sources import Source
from vlmjax.data.text import Tokenizer


def caption_id(caption: str) -> int:
    """A 32-bit number of a caption's text; equal captions are positives of each other's images."""
    return zlib.crc32(caption.encode())


class Examples:
    """Fills rows of batches; nothing in it changes from batch to batch, so any thread or process may use it."""

    def __init__(
        self,
        source: Source,
        image_transform: Any,
        tokenizer: Tokenizer,
        *,
        seed: int = 0,
        captions: str = "random",
        templates: str | Sequence[str] = (),
        clean: str = "",
        background: tuple[int, int, int] = (255, 255, 255),
        max_pixels: int = images.MAX_PIXELS,
        cache_decoded: int | None = None,
        cache_bytes: int = 2 << 30,
    ):
        """See `pipeline.TrainData`."""
        self.source, self._generators = source, plan.Generators(seed)
        self._transform, self._tokenizer = image_transform, tokenizer
        self._rule = CaptionRule.parse(captions, templates, clean)
        alpha = getattr(image_transform, "needs_alpha", False)
        lazy = cache_decoded is None and getattr(image_transform, "takes_jpegs", False)
        # Not a function of its own: worker processes get all of this pickled.
        decode = functools.partial(
            images.open_image if lazy else images.decode,
            background=background,
            max_pixels=max_pixels,
            keep_alpha=alpha,
        )
        self._pixels = loader.Pixels(cache_decoded, cache_bytes, decode)

    def empty(self, rows: int, chunk: plan.Chunk | None = None) -> Batch:
        """A batch of zeros, every row invalid."""
        tokens = self._tokenizer.max_length
        return {
            "pixel_values": np.zeros((rows, *self._transform.output_size, 3), np.uint8),
            "input_ids": np.zeros((rows, tokens), np.int32),
            "attention_mask": np.zeros((rows, tokens), np.int32),
            "caption_id": np.zeros(rows, np.uint32),
            "valid": np.zeros(rows, bool),
            "key": np.full(rows, "", object),
        }

    def fill(self, chunk: plan.Chunk, out: Batch) -> Done:
        """Put the examples of a chunk into the rows `out`; those that cannot be used stay zero and invalid."""
        begin, size = time.perf_counter(), 0
        texts, failures = [""] * len(chunk.indices), []
        places = zip(chunk.positions.tolist(), chunk.indices.tolist(), strict=True)
        for row, (position, index) in enumerate(places):
            made = loader.guarded(self.source, index, lambda i=index, p=position: self._example(i, p))
            if isinstance(made, Failure):
                failures.append(made._replace(source=self._part(index)))
                out["key"][row] = made.key
                continue
            out["pixel_values"][row], (caption, texts[row]), out["key"][row], read = made
            out["caption_id"][row] = caption_id(caption)
            out["valid"][row] = True
            size += read
        tokens, truncated = self._tokenizer.encode_rows(texts)
        for name, value in tokens.items():
            out[name][:] = value
        return Done(failures, len(texts), time.perf_counter() - begin, size, truncated)

    def _part(self, index: int) -> str:
        """The name of the source, of several, that an example is of."""
        part_name = getattr(self.source, "part_name", None)
        return part_name(index) if part_name else self.source.name

    def _example(self, index: int, position: int) -> tuple[np.ndarray, Text, str, int]:
        """Pixels, caption, key and bytes read of one example at one position of the run."""
        pixels, record, size = self._pixels(self.source, index)
        rng = self._generators.at(position)
        text = self._text(record, rng)
        return self._transform(pixels, rng), text, record.key, size

    def text(self, record: Record, position: int) -> Text:
        """Caption and text of a record at one position of the run. Raises BadRecord."""
        return self._text(record, self._generators.at(position))

    def _text(self, record: Record, rng: np.random.Generator) -> Text:
        caption, text = self._rule(record.captions, rng, record.extra)
        # A field that a template names may hold half a surrogate pair, which no tokenizer takes.
        return Text(caption, text.encode("utf-8", "replace").decode())
