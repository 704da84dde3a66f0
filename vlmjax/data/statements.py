"""Statements about two images, true or false: rows of BLIP's training for NLVR2."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmjax.data import images, plan
from vlmjax.data.captions import blip_caption
from vlmjax.data.examples import Made, RowExamples
from vlmjax.data.formats.fields import IMAGE_EXTENSIONS, fields_of
from vlmjax.data.loader import Batch
from vlmjax.data.record import Record
from vlmjax.data.sources import Source
from vlmjax.data.text import Tokenizer
from vlmjax.errors import BadRecord

_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclasses.dataclass(frozen=True)
class Statements:
    """That a row is a statement about two images."""


def truth_of(extra: Mapping[str, Any], key: str = "") -> bool:
    """The field `label` of a record: true or false, 1 or 0, or "True" and "False" as NLVR2 writes it.

    Raises:
        BadRecord: `no_label`.
    """
    found = fields_of(extra, key).get("label")
    word = str(found.item() if isinstance(found, np.generic) else found).strip().lower()
    if word not in _TRUTH:
        raise BadRecord("no_label", key, f"label is {found!r}; expected true or false")
    return _TRUTH[word]


def statement_of(record: Record, clean: str = "") -> str:
    """The statement of a record: its first caption. Raises BadRecord."""
    text = record.captions[0] if record.captions else ""
    text = blip_caption(text) if clean else text
    if not text:
        raise BadRecord("no_caption", record.key, "no statement about its images")
    return text


def two_images(record: Record) -> tuple[bytes | np.ndarray, bytes | np.ndarray]:
    """Left and right image of a record: its `images`, or in a tar KEY.left.jpg and KEY.right.jpg.

    Raises BadRecord unless there are two.
    """
    found = tuple(record.extra.get("images", ()))
    right = [
        name for name in record.extra if name.startswith("right.") and name[6:].lower() in IMAGE_EXTENSIONS
    ]
    if not found and len(right) == 1:
        found = (record.image, record.extra[right[0]])
    if len(found) != 2:
        count = len(found) or len(record.image) > 0
        raise BadRecord("image_count", record.key, f"{int(count)} image(s); a statement is about two")
    return found


class StatementExamples(RowExamples):
    """Fills rows of batches with statements about two images.

    A batch is a dict of arrays over this host's rows:

        pixel_values                   uint8 [b, 2, h, w, 3]      left and right
        input_ids, attention_mask      int32 [b, t]
        label                          int32 [b]                  1 where the statement is true
        valid                          bool [b]
        key                            object [b]
    """

    def __init__(
        self,
        source: Source,
        image_transform: Any,
        tokenizer: Tokenizer,
        kind: Statements,
        *,
        seed: int = 0,
        clean: str = "",
        background: tuple[int, int, int] = (255, 255, 255),
        max_pixels: int = images.MAX_PIXELS,
    ):
        """See `pipeline.TrainData`."""
        reading = {"background": background, "max_pixels": max_pixels}
        super().__init__(source, image_transform, tokenizer, seed=seed, **reading)
        self._clean = clean

    def empty(self, rows: int, chunk: plan.Chunk | None = None) -> Batch:
        """A batch of zeros, every row invalid."""
        tokens = self._tokenizer.max_length
        return {
            "pixel_values": np.zeros((rows, 2, *self._transform.output_size, 3), np.uint8),
            "input_ids": np.zeros((rows, tokens), np.int32),
            "attention_mask": np.zeros((rows, tokens), np.int32),
            "label": np.zeros(rows, np.int32),
            "valid": np.zeros(rows, bool),
            "key": np.full(rows, "", object),
        }

    def _example(self, index: int, position: int) -> Made:
        record = self.source[index]
        rng = self._generators.at(position)
        both, truth = two_images(record), truth_of(record.extra, record.key)
        pixels, size = self._seen(both, record.key, rng)
        values = {"pixel_values": np.stack(pixels), "label": np.int32(truth)}
        return Made(values, statement_of(record, self._clean), record.key, size)

    def _tokenize(self, said: list[str], out: Batch) -> int:
        return self._tokens(said, out)
