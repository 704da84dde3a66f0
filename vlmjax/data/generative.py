"""Rows of conversations for models that write: tokens, what of them has loss, images, and where their features go."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmjax.data import conversation, images, loader, packing, pieces, plan
from vlmjax.data.captions import CaptionRule
from vlmjax.data.conversation import Conversation
from vlmjax.data.examples import part_of
from vlmjax.data.grouped import GroupedChunk
from vlmjax.data.loader import Batch, Done, Failure
from vlmjax.data.packed import PackedChunk
from vlmjax.data.record import Record
from vlmjax.data.sources import Source, captions_of, turns_of
from vlmjax.data.text import Tokenizer
from vlmjax.errors import BadRecord

# What is asked about an image that comes with captions alone; the templates decide whether it is used.
QUESTIONS = (
    "Describe the picture in one sentence.",
    "What does this picture show?",
    "Say briefly what can be seen here.",
    "Give a short caption for this image.",
    "In a few words, what is in the picture?",
)


GREY = 127


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a row of a generative batch is.

    Attributes:
        template: of `conversation_templates`, or "tokenizer" for the tokenizer's own.
        max_length: tokens of a row, those of images included.
        image_tokens: of one image.
        image_token_id: which stands for each of them.
        images_per_row: places for images in a row; rows with fewer leave some empty.
        packing: whether a row may hold several conversations.
        lengths: that rows of one conversation are padded to, in batches of like length, with images or without; () for
            all to max_length. The last is max_length.
        window: how many are packed or grouped together: enough for rows that are nearly full, and few enough that the
            first batch does not wait long.
        image_first, system: see `conversation.render`.
        blind: every picture is grey, which leaves what can be learned from words alone.
    """

    template: str
    max_length: int
    image_tokens: int
    image_token_id: int
    images_per_row: int = 1
    packing: bool = False
    lengths: tuple[int, ...] = ()
    window: int = 1024
    image_first: bool = False
    system: str = ""
    blind: bool = False


class _Made(NamedTuple):
    encoded: pieces.Encoded
    pixels: list[np.ndarray]
    key: str
    read: int


class GenerativeExamples:
    """Fills rows of batches of conversations; nothing in it changes from batch to batch.

    A batch is a dict of arrays over this host's rows, the same shapes whatever is in them; only with `Rows.lengths`
    t is one of these and slots may be 0:

        input_ids        int32 [b, t]     conversations, the tokenizer's padding after them
        targets          int32 [b, t]     the token after each one
        target_weights   float32 [b, t]   1 where it is to be learned: on answers and their stop; never across segments
        position_ids     int32 [b, t]     from 0 in each conversation
        segment_ids      int32 [b, t]     1, 2, ... for the conversations of a row, 0 on padding
        image_index      int32 [b, t]     on an image's tokens slot * image_tokens + k, else -1
        pixel_values     uint8 [b, slots, h, w, 3], zeros where there is no image
        image_valid      bool [b, slots]
        valid            bool [b]         whether the row holds anything
        key              object [b]       of its records, with spaces between

    Every array begins with the row, so a batch is cut by rows wherever it is placed. Features of a row's images, laid
    end to end as [slots * image_tokens, width], are gathered by `image_index`. A loss over several hosts or
    micro-batches divides by the sum of all their `target_weights`.
    """

    def __init__(
        self,
        source: Source,
        image_transform: Any,
        tokenizer: Tokenizer,
        rows: Rows,
        *,
        seed: int = 0,
        captions: str = "random",
        templates: str | Sequence[str] = (),
        clean: str = "",
        background: tuple[int, int, int] = (255, 255, 255),
        max_pixels: int = images.MAX_PIXELS,
    ):
        """See `pipeline.TrainData`. Raises DataError where the template is not one of this tokenizer."""
        self.source, self.rows, self._generators = source, rows, plan.Generators(seed)
        self._transform, self._pieces = image_transform, pieces.Pieces(tokenizer)
        # A template that cannot be used is a mistake of the recipe, not of every record.
        pieces.rendered(conversation.from_caption("a", "q"), rows.template, self._pieces, system=rows.system)
        self._rule = CaptionRule.parse(captions, templates, clean)
        self._needs_extra = bool(self._rule.templates)
        lazy = getattr(image_transform, "takes_jpegs", False)
        self._decode = functools.partial(
            images.open_image if lazy else images.decode,
            background=background,
            max_pixels=max_pixels,
            keep_alpha=getattr(image_transform, "needs_alpha", False),
        )

    def empty(self, rows: int, chunk: plan.Chunk | None = None) -> Batch:
        """A batch without conversations, of the shape of `chunk`."""
        tokens, slots = (rows, self.rows.max_length), (rows, self.rows.images_per_row)
        if isinstance(chunk, GroupedChunk):
            tokens, slots = (rows, chunk.tokens), (rows, self.rows.images_per_row * chunk.with_images)
        return {
            "input_ids": np.full(tokens, self._pieces.pad_token_id, np.int32),
            "targets": np.full(tokens, self._pieces.pad_token_id, np.int32),
            "target_weights": np.zeros(tokens, np.float32),
            "position_ids": np.zeros(tokens, np.int32),
            "segment_ids": np.zeros(tokens, np.int32),
            "image_index": np.full(tokens, -1, np.int32),
            "pixel_values": np.zeros((*slots, *self._transform.output_size, 3), np.uint8),
            "image_valid": np.zeros(slots, bool),
            "valid": np.zeros(rows, bool),
            "key": np.full(rows, "", object),
        }

    def fill(self, chunk: plan.Chunk, out: Batch) -> Done:
        """Put the conversations of a chunk into the rows `out`; those that cannot be used leave their place empty."""
        begin, size, cut, failures = time.perf_counter(), 0, 0, []
        count, length = out["input_ids"].shape
        laid = packing.empty_rows(count, length, self._pieces.pad_token_id)
        used = np.zeros(count, np.int64)  # slots of each row
        for position, index, row, start, room, segment in _places(chunk, length):
            made = loader.guarded(self.source, index, lambda i=index, p=position: self._example(i, p))
            if isinstance(made, Failure):
                failures.append(made._replace(source=part_of(self.source, index)))
                self._name(out, row, made.key)
                continue
            encoded = made.encoded
            packing.lay(laid, row, start, room, segment, encoded.input_ids, encoded.loss_weights)
            self._place_images(out, row, start, made, int(used[row]))
            used[row] += len(made.pixels)
            out["valid"][row] = True
            self._name(out, row, made.key)
            size, cut = size + made.read, cut + (encoded.cut > 0)
        for name in ("input_ids", "position_ids", "segment_ids"):
            out[name][:] = laid[name]
        out["targets"][:, :-1] = laid["input_ids"][:, 1:]
        out["target_weights"][:, :-1] = laid["loss_weights"][:, 1:]
        after = chunk.after if isinstance(chunk, PackedChunk | GroupedChunk) else None
        seconds = time.perf_counter() - begin
        return Done(failures, len(chunk.indices), seconds, size, cut, after)

    def _place_images(self, out: Batch, row: int, start: int, made: _Made, slot: int) -> None:
        for (at, count), pixels in zip(made.encoded.spans, made.pixels, strict=True):
            out["pixel_values"][row, slot], out["image_valid"][row, slot] = pixels, True
            first = slot * self.rows.image_tokens
            out["image_index"][row, start + at : start + at + count] = np.arange(first, first + count)
            slot += 1

    def _name(self, out: Batch, row: int, key: str) -> None:
        out["key"][row] = f"{out['key'][row]} {key}".strip()

    def measure(self, positions: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, images) of the examples that stand at these positions: int64 [n] each. No image is decoded.

        One that cannot be used has a single token: it is given a place, in which it is met and counted.
        """
        sizes = [self._size(*one) for one in zip(positions.tolist(), indices.tolist(), strict=True)]
        tokens, counts = np.array(sizes, np.int64).reshape(-1, 2).T
        return tokens, counts

    def _size(self, position: int, index: int) -> tuple[int, int]:
        encoded = loader.guarded(self.source, index, lambda: self._encoded_at(position, index))
        return (1, 0) if isinstance(encoded, Failure) else (len(encoded.input_ids), len(encoded.spans))

    def _encoded_at(self, position: int, index: int) -> pieces.Encoded:
        """Without the record's images where the source can tell its words apart."""
        rng = self._generators.at(position)
        turns = turns_of(self.source, index)
        if turns:
            return self._encoded(conversation.from_turns(turns))
        if self._needs_extra:
            return self._encoded(self.conversation(self.source[index], rng))
        return self._encoded(self._asked(captions_of(self.source, index), {}, 1, rng))

    def conversation(self, record: Record, rng: np.random.Generator) -> Conversation:
        """What is said about a record: its own conversation, or a caption as the answer to a question.

        Raises:
            BadRecord: it has neither, or its conversation is none.
        """
        turns = conversation.turns_in(record.extra, record.key)
        if turns:
            return conversation.from_turns(turns, record.key)
        return self._asked(record.captions, record.extra, 1, rng)

    def _asked(
        self, captions: Sequence[str], extra: dict[str, Any], count: int, rng: np.random.Generator
    ) -> Conversation:
        answer = self._rule(captions, rng, extra).text
        return conversation.from_caption(answer, QUESTIONS[int(rng.integers(len(QUESTIONS)))], count)

    def _encoded(self, said: Conversation, key: str = "") -> pieces.Encoded:
        rows = self.rows
        return pieces.encode(
            said,
            rows.template,
            self._pieces,
            image_tokens=rows.image_tokens,
            image_token_id=rows.image_token_id,
            max_length=rows.max_length,
            max_images=rows.images_per_row,
            system=rows.system,
            image_first=rows.image_first,
            key=key,
        )

    def _example(self, index: int, position: int) -> _Made:
        record = self.source[index]
        rng = self._generators.at(position)
        said = self.conversation(record, rng)
        found = images_of(record)
        if conversation.count(said) != len(found):
            detail = f"{conversation.count(said)} images in the text, {len(found)} in the record"
            raise BadRecord("image_marks", record.key, detail)
        encoded = self._encoded(said, record.key)
        pixels, read = [], 0
        for image in found[: len(encoded.spans)]:
            if self.rows.blind:
                pixels.append(np.full((*self._transform.output_size, 3), GREY, np.uint8))
                continue
            try:
                pixels.append(self._transform(self._decode(image), rng))
            except BadRecord as error:
                raise BadRecord(error.reason, record.key, error.detail) from error
            read += len(image) if isinstance(image, bytes) else 0
        return _Made(encoded, pixels, record.key, read)


def images_of(record: Record) -> tuple[bytes | np.ndarray, ...]:
    """The images of a record that is no document, in the order in which its conversation names them."""
    return tuple(record.extra.get("images", ())) or ((record.image,) if len(record.image) else ())


def _places(chunk: plan.Chunk, capacity: int) -> list[tuple[int, ...]]:
    """(position, example, row, first token, tokens, segment) of everything in a chunk."""
    n = len(chunk.indices)
    if isinstance(chunk, PackedChunk):
        columns = (chunk.row, chunk.first, chunk.length, chunk.segment)
    else:
        columns = (np.arange(n), np.zeros(n, int), np.full(n, capacity), np.ones(n, int))
    columns = (chunk.positions, chunk.indices, *columns)
    return list(zip(*(column.tolist() for column in columns), strict=True))
