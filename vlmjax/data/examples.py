"""One example of a training batch: record, pixels, caption and tokens, as a function of (source, seed, position)."""

import functools
import time
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmjax.data import images, loader, plan
from vlmjax.data.captions import CaptionRule, Text
from vlmjax.data.loader import Batch, Done, Failure
from vlmjax.data.record import Record
from vlmjax.data.sources import Source
from vlmjax.data.text import Tokenizer
from vlmjax.errors import BadRecord


def caption_id(caption: str) -> int:
    """A 32-bit number of a caption's text; equal captions are positives of each other's images."""
    return zlib.crc32(caption.encode())


def image_id(image: bytes | np.ndarray) -> int:
    """A 32-bit number of an image: that of the same file, or of the same pixels, is the same."""
    return zlib.crc32(image if isinstance(image, bytes) else np.ascontiguousarray(image))


class Made(NamedTuple):
    """What one example puts into its row.

    Attributes:
        values: arrays and numbers by the names of a batch.
        said: what of it is to be tokenised.
        key: of the record.
        read: bytes that were read for it.
    """

    values: dict[str, Any]
    said: Any
    key: str
    read: int


class RowExamples:
    """Fills rows of batches, an example each; nothing in it changes from batch to batch.

    So any thread or process may use it. A kind of examples says what a row is: `empty`, `_example` and `_tokenize`.
    """

    NOTHING: Any = ""  # what is said in a row that holds nothing

    def __init__(
        self,
        source: Source,
        image_transform: Any,
        tokenizer: Tokenizer | None,
        *,
        seed: int = 0,
        **reading: Any,
    ):
        """Arguments are those of `pipeline.TrainData`; `reading` are those of `images.decode`."""
        self.source, self._generators = source, plan.Generators(seed)
        self._transform, self._tokenizer = image_transform, tokenizer
        lazy = reading.pop("lazy", True) and getattr(image_transform, "takes_jpegs", False)
        # Not a function of its own: worker processes get all of this pickled.
        self._decode = functools.partial(
            images.open_image if lazy else images.decode,
            keep_alpha=getattr(image_transform, "needs_alpha", False),
            **reading,
        )

    def empty(self, rows: int, chunk: plan.Chunk | None = None) -> Batch:
        """A batch of zeros, every row invalid."""
        raise NotImplementedError

    def _example(self, index: int, position: int) -> Made:
        """One example at one position of the run. Raises BadRecord."""
        raise NotImplementedError

    def _tokenize(self, said: list[Any], out: Batch) -> int:
        """Put the tokens of what is said into the rows `out`; how many texts were cut."""
        raise NotImplementedError

    def _tokens(self, texts: list[str], out: Batch) -> int:
        """Put the tokens of a text for each row into `out`; how many texts were cut."""
        tokens, truncated = self._tokenizer.encode_rows(texts)
        for name, value in tokens.items():
            out[name][:] = value
        return truncated

    def _seen(
        self, found: Sequence[bytes | np.ndarray], key: str, rng: np.random.Generator
    ) -> tuple[list[np.ndarray], int]:
        """Pixels of a record's images as the model sees them, and the bytes that were read. Raises BadRecord."""
        try:
            pixels = [self._transform(self._decode(image), rng) for image in found]
        except BadRecord as error:
            raise BadRecord(error.reason, key, error.detail) from error
        return pixels, sum(len(image) for image in found if isinstance(image, bytes))

    def fill(self, chunk: plan.Chunk, out: Batch) -> Done:
        """Put the examples of a chunk into the rows `out`; those that cannot be used stay zero and invalid."""
        begin, size = time.perf_counter(), 0
        said, failures = [self.NOTHING] * len(chunk.indices), []
        places = zip(chunk.positions.tolist(), chunk.indices.tolist(), strict=True)
        for row, (position, index) in enumerate(places):
            made = loader.guarded(self.source, index, lambda i=index, p=position: self._example(i, p))
            if isinstance(made, Failure):
                failures.append(made._replace(source=part_of(self.source, index)))
                out["key"][row] = made.key
                continue
            for name, value in made.values.items():
                out[name][row] = value
            out["valid"][row], out["key"][row], said[row] = True, made.key, made.said
            size += made.read
        truncated = self._tokenize(said, out)
        return Done(failures, len(said), time.perf_counter() - begin, size, truncated)


def part_of(source: Source, index: int) -> str:
    """The name of the source, of several, that an example is of."""
    part_name = getattr(source, "part_name", None)
    return part_name(index) if part_name else source.name


class Examples(RowExamples):
    """Pairs of an image and a text."""

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
        image_ids: bool = False,
    ):
        """See `pipeline.TrainData`."""
        self._image_ids, self._from_pixels = image_ids, cache_decoded is not None
        reading = {"background": background, "max_pixels": max_pixels, "lazy": cache_decoded is None}
        super().__init__(source, image_transform, tokenizer, seed=seed, **reading)
        self._rule = CaptionRule.parse(captions, templates, clean)
        self._pixels = loader.Pixels(cache_decoded, cache_bytes, self._decode)

    def empty(self, rows: int, chunk: plan.Chunk | None = None) -> Batch:
        """A batch of zeros, every row invalid."""
        tokens = self._tokenizer.max_length
        batch = {
            "pixel_values": np.zeros((rows, *self._transform.output_size, 3), np.uint8),
            "input_ids": np.zeros((rows, tokens), np.int32),
            "attention_mask": np.zeros((rows, tokens), np.int32),
            "caption_id": np.zeros(rows, np.uint32),
            "valid": np.zeros(rows, bool),
            "key": np.full(rows, "", object),
        }
        return batch | ({"image_id": np.zeros(rows, np.uint32)} if self._image_ids else {})

    def _example(self, index: int, position: int) -> Made:
        pixels, record, size = self._pixels(self.source, index)
        rng = self._generators.at(position)
        caption, text = self._text(record, rng)
        values = {"caption_id": caption_id(caption)}
        if self._image_ids:
            # Of an image in the cache nothing but its pixels is left.
            values["image_id"] = image_id(pixels if self._from_pixels else record.image)
        values["pixel_values"] = self._transform(pixels, rng)
        return Made(values, text, record.key, size)

    def _tokenize(self, said: list[str], out: Batch) -> int:
        return self._tokens(said, out)

    def text(self, record: Record, position: int) -> Text:
        """Caption and text of a record at one position of the run. Raises BadRecord."""
        return self._text(record, self._generators.at(position))

    def _text(self, record: Record, rng: np.random.Generator) -> Text:
        caption, text = self._rule(record.captions, rng, record.extra)
        # A field that a template names may hold half a surrogate pair, which no tokenizer takes.
        return Text(caption, text.encode("utf-8", "replace").decode())
