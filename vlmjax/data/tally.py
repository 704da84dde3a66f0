"""What is known of data record by record: read, decoded, hashed, and counted up for `stats`."""

import dataclasses
import hashlib
from array import array
from collections import Counter
from typing import Any

import numpy as np

from vlmjax.data import hashes, images
from vlmjax.data.pictures.signatures import format_of
from vlmjax.data.sources import key_of
from vlmjax.errors import BadRecord

_SHOWN = 5


@dataclasses.dataclass
class One:
    """What is kept of one record until it is counted."""

    key: str
    reason: str = ""
    detail: str = ""
    captions: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    images: tuple[tuple[str, int, int, int], ...] = ()  # format, bytes, width, height
    digest: bytes = b""
    hash: int = 0
    colors: bytes = b""


def examine(source: Any, i: int, tokenizer: Any = None) -> One:
    """Read and decode record i; a bad one comes back with its reason."""
    key = ""
    try:
        record = source[i]
        key, found = record.key, _images(record)
        pixels = [images.decode(image) for image in found]
        seen = hashes.look(pixels[0]) if found else None
    except BadRecord as error:
        return One(key or error.key or _key(source, i), error.reason, error.detail)
    except Exception as error:  # training counts it under this name too
        return One(key or _key(source, i), f"error_{type(error).__name__}", str(error)[:200])
    sizes = tuple((*_kind(image), p.shape[1], p.shape[0]) for image, p in zip(found, pixels, strict=True))
    captions = tuple(record.captions)
    tokens = tuple(tokenizer.lengths(captions).tolist()) if tokenizer and captions else ()
    one = One(record.key, captions=captions, tokens=tokens, images=sizes)
    if seen is not None:
        one.digest = hashlib.sha256(b"".join(map(hashes.digest, found))).digest()[:16]
        one.hash, one.colors = seen.hash, seen.colors.tobytes()
    return one


def _kind(image: bytes | np.ndarray) -> tuple[str, int]:
    """The format of an image and its bytes."""
    return ("pixels", image.nbytes) if isinstance(image, np.ndarray) else (format_of(image), len(image))


def _key(source: Any, i: int) -> str:
    try:
        return key_of(source, i)
    except Exception:  # this is already the report of a failure
        return f"example {i}"


def _images(record: Any) -> list[bytes | np.ndarray]:
    """All images of a record: of a document, of several, or its one; none of a text alone."""
    if record.parts:
        return [part for part in record.parts if not isinstance(part, str)]
    if "images" in record.extra:
        return list(record.extra["images"])
    text_alone = not len(record.image) and "conversations" in record.extra
    return [] if text_alone else [record.image]


class Tally:
    """Counts records one by one, in the order of the source, in bounded memory each."""

    def __init__(self, max_length: int | None = None):
        """Nothing counted yet; captions of more tokens than `max_length` will be."""
        self._max_length = max_length
        self.records = self.readable = self.without_image = self.without_caption = 0
        self.unreadable: Counter[str] = Counter()
        self.unreadable_keys: dict[str, list[str]] = {}
        self.formats: Counter[str] = Counter()
        self._values = {name: array("q") for name in ("width", "height", "bytes", "captions_per_record")}
        self._values |= {f"caption_{name}": array("q") for name in ("words", "characters", "tokens")}
        self._texts, self._hashes = array("Q"), array("Q")
        self._digests, self._colors, self._keys = bytearray(), bytearray(), []

    def add(self, one: One) -> None:
        """Count one record."""
        self.records += 1
        if one.reason:
            self.unreadable[one.reason] += 1
            self.unreadable_keys.setdefault(one.reason, [])
            if len(self.unreadable_keys[one.reason]) < _SHOWN:
                self.unreadable_keys[one.reason].append(one.key)
            return
        self.readable += 1
        self.without_caption += not one.captions
        self.without_image += not one.images
        values = self._values
        for name, size, width, height in one.images:
            self.formats[name] += 1
            values["bytes"].append(size)
            values["width"].append(width)
            values["height"].append(height)
        values["captions_per_record"].append(len(one.captions))
        for text in one.captions:
            values["caption_words"].append(len(text.split()))
            values["caption_characters"].append(len(text))
            self._texts.append(
                int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
            )
        values["caption_tokens"].extend(one.tokens)
        if one.images:
            self._hashes.append(one.hash)
            self._digests += one.digest
            self._colors += one.colors
            self._keys.append(one.key)

    def result(self, bits: int) -> dict[str, Any]:
        """All figures, as --out writes them."""
        values = {name: np.frombuffer(kept, np.int64) for name, kept in self._values.items()}
        aspect = values["width"] / np.maximum(1, values["height"])
        texts = np.frombuffer(self._texts, np.uint64)
        return {
            "readable": self.readable,
            "unreadable": dict(self.unreadable.most_common()),
            "unreadable_keys": self.unreadable_keys,
            "without_image": self.without_image,
            "without_caption": self.without_caption,
            **self._duplicates(bits),
            "captions": len(texts),
            "captions_too_long": None
            if self._max_length is None
            else int((values["caption_tokens"] > self._max_length).sum()),
            "equal_captions": len(texts) - len(np.unique(texts)),
            "formats": dict(self.formats.most_common()),
            **{name: summary(kept) for name, kept in values.items()},
            "aspect": summary(aspect),
        }

    def _duplicates(self, bits: int) -> dict[str, Any]:
        digests = np.frombuffer(bytes(self._digests), "V16")
        first = hashes.repeats(digests)
        again = np.flatnonzero(first != np.arange(len(first)))
        kept = np.flatnonzero(first == np.arange(len(first)))
        colors = np.frombuffer(bytes(self._colors), np.uint8).reshape(-1, hashes.COLORS)[kept]
        near = hashes.near_pairs(np.frombuffer(self._hashes, np.uint64)[kept], colors, bits)
        later, places = np.unique(near[:, 1], return_index=True)
        return {
            "exact_duplicates": len(again),
            "exact_duplicate_keys": [[self._keys[first[i]], self._keys[i]] for i in again[:_SHOWN].tolist()],
            "near_duplicates": len(later),
            "near_duplicate_keys": [
                [self._keys[kept[a]], self._keys[kept[b]]] for a, b in near[places[:_SHOWN]].tolist()
            ],
            "near_bits": bits,
        }


def summary(values: np.ndarray) -> dict[str, float] | None:
    """Of some numbers their min, p5, median, p95, max and mean; None of none."""
    if not len(values):
        return None
    marks = np.percentile(values, [0, 5, 50, 95, 100])
    names = ("min", "p5", "median", "p95", "max")
    return {n: round(float(v), 4) for n, v in zip((*names, "mean"), (*marks, values.mean()), strict=True)}
