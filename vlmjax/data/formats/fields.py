"""Which part of an example is its image and which its captions: the names that data files use, in one place."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmjax.errors import BadRecord

IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg jpe jfif png webp gif bmp tif tiff avif jp2 j2k ppm pgm pnm pbm".split()
)
TEXT_EXTENSIONS = ("txt", "caption", "text")
# Inside a json value or a nested feature: what a caption is called there.
CAPTION_FIELDS = ("caption", "captions", "text", "sentence", "sentences")
_FIELD = re.compile(rb'"(?:' + "|".join(CAPTION_FIELDS).encode() + rb')"\s*:\s*')
_DEEPEST = 64  # levels of lists and objects around a caption
# Of tables, parquet files, datasets: how a column may be called, the most telling name first.
IMAGE_COLUMNS = (
    "image image_path file_name filename filepath file_path path file img image_file picture jpg jpeg png webp "
    "image_bytes image/encoded images"
).split()
CAPTION_COLUMNS = (
    "caption captions text texts txt sentence sentences title description alt_text captions/text caption/text raw"
).split()
QUESTION = "question"  # what is asked about an image, in place of a caption
KEY_COLUMNS = ("key", "__key__", "id", "image_id", "image/id", "uid", "url")


def image_extension(extensions: Sequence[str]) -> str | None:
    """Which member is the image: a plain image extension first ('jpg'), else one ending so ('input.png')."""
    plain = [e for e in extensions if e in IMAGE_EXTENSIONS]
    ending = [e for e in extensions if e.rpartition(".")[2] in IMAGE_EXTENSIONS]
    return (plain or ending or [None])[0]


def captions_of(value: Any, key: str = "", depth: int = 0) -> list[str]:
    """Every caption in a decoded value: text, a list of texts, or an object with a caption field.

    `key` is for the error's message, `depth` the levels around the value. Raises BadRecord where there are too many.
    """
    if depth > _DEEPEST:
        raise BadRecord("bad_json", key, f"captions more than {_DEEPEST} levels deep")
    if isinstance(value, str):
        return [value]
    if isinstance(value, bytes):
        return [value.decode("utf-8", "replace")]
    if isinstance(value, dict):
        inside = [value[name] for name in CAPTION_FIELDS if name in value]
        return [text for item in inside for text in captions_of(item, key, depth + 1)]
    if hasattr(value, "tolist") or isinstance(value, (list, tuple)):
        items = value.tolist() if hasattr(value, "tolist") else value
        inside = items if isinstance(items, (list, tuple)) else []
        return [text for item in inside for text in captions_of(item, key, depth + 1)]
    return []


def tidy(captions: Sequence[str]) -> tuple[str, ...]:
    """Captions stripped, without empty ones and repetitions, in order; half of a surrogate pair becomes "?"."""
    out = {}
    for text in captions:
        whole = text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
        out[" ".join(whole.split())] = None
    out.pop("", None)
    return tuple(out)


def says_more(data: bytes, known: bytes) -> bool:
    """False when a json file can hold no caption but `known`, which img2dataset writes twice; it need not be parsed."""
    first = _FIELD.search(data)
    if first is None:
        return False
    plain = known.isascii() and b"\\" not in known and b'"' not in known
    same = plain and data.startswith(b'"' + known + b'"', first.end())
    return not same or _FIELD.search(data, first.end()) is not None


def parse_json(data: bytes, key: str) -> Any:
    """A json member of an example. Raises BadRecord."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRecord("bad_json", key, str(error)) from error


def fields_of(extra: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What a record knows besides, with the fields of its json member where it has one. Raises BadRecord."""
    body = parse_json(extra["json"], key) if isinstance(extra.get("json"), bytes) else None
    return {**body, **extra} if isinstance(body, dict) else extra
