"""From a row of named values (of a table, a parquet file, a dataset) to a record: pairs, conversations, documents."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmjax.data import conversation
from vlmjax.data.conversation import MARK
from vlmjax.data.formats.fields import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    KEY_COLUMNS,
    QUESTION,
    captions_of,
    tidy,
)
from vlmjax.data.record import Record
from vlmjax.data.storage import files, shards
from vlmjax.errors import BadRecord, DataError

CONVERSATIONS = "conversations"

Row = Mapping[str, Any]
Load = Callable[[Any, str], bytes | np.ndarray]


class NoColumn(DataError):
    """A table without a column that is needed."""


@dataclass(frozen=True)
class Layout:
    """What the columns of some rows mean.

    Attributes:
        kind: "pairs" (an image and captions), "conversations" (LLaVA, or Hugging Face's messages), "documents"
            (OBELICS, MMC4).
        image: the column of the image or images, None where rows have none.
        captions: the columns of captions, for pairs; none where a question is asked instead.
        key: the column that identifies a row, None to use the row's place.
        talk: the column of the turns, for conversations.
    """

    kind: str
    image: str | None
    captions: tuple[str, ...]
    key: str | None
    talk: str = CONVERSATIONS


def find_layout(
    where: str,
    row: Row,
    *,
    image_column: str | None = None,
    caption_columns: Sequence[str] | str | None = None,
) -> Layout:
    """What kind of rows these are, from one of them and the options.

    Args:
        where: the file, for messages.
        row: the first row; its values tell documents from pairs.
        image_column, caption_columns: names that are not among the usual ones.

    Raises:
        DataError: no column for the image or the captions (the message lists those there are).
    """
    wanted = [caption_columns] if isinstance(caption_columns, str) else list(caption_columns or ())
    key = _look_up(row, KEY_COLUMNS)
    talk = next((name for name in conversation.TALKS if isinstance(row.get(name), (list, tuple))), None)
    talk = talk or (CONVERSATIONS if CONVERSATIONS in row else None)
    if talk and not wanted:
        image = _column(where, row, [image_column], "an image", "image_column") if image_column else None
        return Layout(CONVERSATIONS, image or _look_up(row, IMAGE_COLUMNS) or "image", (), key, talk)
    if not wanted and not image_column and _is_document(row):
        return Layout("documents", None, (), key)
    image = _column(where, row, [image_column] if image_column else IMAGE_COLUMNS, "an image", "image_column")
    captions = [_column(where, row, [name], "a caption", "caption_columns") for name in wanted]
    if not captions and (QUESTION not in row or _look_up(row, CAPTION_COLUMNS)):
        captions = [_column(where, row, CAPTION_COLUMNS, "a caption", "caption_columns")]
    return Layout("pairs", image, tuple(captions), key)


def _is_document(row: Row) -> bool:
    """OBELICS: `images` and `texts` of equal length, one of both at each place. MMC4: `text_list`."""
    if isinstance(row.get("text_list"), (list, tuple)):
        return "image_info" in row
    images, texts = row.get("images"), row.get("texts")
    if (
        not isinstance(images, (list, tuple))
        or not isinstance(texts, (list, tuple))
        or len(images) != len(texts)
    ):
        return False
    return all((image is None) != (text is None) for image, text in zip(images, texts, strict=True))


def _look_up(row: Row, names: Sequence[str]) -> str | None:
    """The first of `names` that the row has; case does not matter unless two columns differ in it."""
    folded = {str(column).strip().lower(): column for column in row}
    for name in names:
        if name in row:
            return name
        if name.lower() in folded:
            return folded[name.lower()]
    return None


def _column(where: str, row: Row, names: Sequence[str], what: str, option: str) -> str:
    found = _look_up(row, names)
    if found is not None:
        return found
    have, wanted = ", ".join(map(str, row)) or "none", ", ".join(names)
    raise NoColumn(
        f"{where} has no column for {what}: looked for {wanted}; it has {have}; rename its column, or "
        f"name it with {option} (config.data.{option} of a recipe)"
    )


def record(row: Row, key: str, layout: Layout, load: Load) -> Record:
    """The record of a row. Raises BadRecord where it lacks what its layout promises."""
    if layout.kind == CONVERSATIONS:
        return _conversation(row, key, layout, load)
    if layout.kind == "documents":
        return _document(row, key, load)
    value = row.get(layout.image)
    if value is None or (isinstance(value, (str, bytes, list, tuple)) and not len(value)):
        raise BadRecord("no_image", key, f"column {layout.image} is {value!r}")
    images = _images(value, key, load)
    captions = [text for column in layout.captions for text in captions_of(row.get(column), key)]
    extra = {n: v for n, v in row.items() if n != layout.image and n not in layout.captions}
    return Record(key, images[0], tidy(captions), extra | _several(images))


def _images(value: Any, key: str, load: Load) -> tuple[bytes | np.ndarray, ...]:
    """One image, or all of a list."""
    if isinstance(value, (list, tuple)):
        return tuple(load(item, key) for item in value)
    return (load(value, key),)


def _several(images: tuple[Any, ...]) -> dict[str, Any]:
    return {"images": images} if len(images) > 1 else {}


def _conversation(row: Row, key: str, layout: Layout, load: Load) -> Record:
    """Captions are given only where there is a single round about an image: its answer describes the image."""
    turns = turns_of(row, key, layout)
    images = _images(_pictures(row, layout), key, load)
    marks = sum(turn["value"].count(MARK) for turn in turns)
    if marks != len(images):
        raise BadRecord("image_marks", key, f"{marks} times {MARK} in the text, {len(images)} images")
    answers = [turn["value"] for turn in turns if turn["from"] == "gpt"]
    captions = answers if len(answers) == 1 and len(images) == 1 else []
    extra = {n: v for n, v in row.items() if n not in (layout.image, layout.talk)}
    extra |= {CONVERSATIONS: turns} | _several(images)
    return Record(key, images[0] if images else b"", tidy(captions), extra)


def turns_of(row: Row, key: str, layout: Layout) -> list[dict[str, str]]:
    """What is said in a row, of either form, in LLaVA's. Raises BadRecord, as `conversation.from_turns` does."""
    return conversation.plain_turns(row.get(layout.talk), key)


def _pictures(row: Row, layout: Layout) -> list[Any]:
    """The images of a row as it holds them: in a column of their own, or inside the parts of messages."""
    for name in dict.fromkeys((layout.image, "image", "images")):
        value = row.get(name)
        if isinstance(value, (list, tuple)) and len(value):
            return list(value)
        if isinstance(value, np.ndarray) or value:
            return [value]
    said = row.get(layout.talk)
    parts = [
        part
        for message in (said if conversation.is_messages(said) else ())
        if isinstance(message.get("content"), (list, tuple))
        for part in message["content"]
    ]
    found = [_picture(part) for part in parts if part.get("type") in ("image", "image_url")]
    return [one for one in found if one is not None]


def _picture(part: Mapping[str, Any]) -> Any:
    value = next((part[name] for name in ("image", "path", "url", "image_url") if part.get(name)), None)
    return value.get("url") if isinstance(value, Mapping) and "url" in value else value


def _document(row: Row, key: str, load: Load) -> Record:
    parts = _mmc4(row, key) if "text_list" in row else _obelics(row, key)
    parts = tuple(part if isinstance(part, str) else load(part[0], key) for part in parts)
    images = [part for part in parts if not isinstance(part, str)]
    used = ("images", "texts", "text_list", "image_info")
    return Record(
        key, images[0] if images else b"", (), {n: v for n, v in row.items() if n not in used}, parts
    )


def _obelics(row: Row, key: str) -> list[Any]:
    """Texts as str, images as (value,)."""
    if not _is_document(row):
        raise BadRecord("bad_document", key, "images and texts do not take turns")
    pairs = zip(row["images"], row["texts"], strict=True)
    return [text if image is None else (image,) for image, text in pairs]


def _mmc4(row: Row, key: str) -> list[Any]:
    """Each image stands before the sentence it was matched with."""
    texts, infos = row["text_list"], row.get("image_info") or []
    before: dict[int, list[Any]] = {}
    for info in infos:
        place = info.get("matched_text_index") if isinstance(info, Mapping) else None
        name = info.get("image_name") or info.get("raw_url") if isinstance(info, Mapping) else None
        if not isinstance(place, int) or not 0 <= place < len(texts) or not name:
            raise BadRecord("bad_document", key, f"image_info {str(info)[:80]}")
        before.setdefault(place, []).append((name,))
    return [part for i, text in enumerate(texts) for part in (*before.get(i, ()), text)]


class Loader:
    """An image as rows hold it, as bytes or pixels: bytes, {"bytes", "path"}, a path or address, an array."""

    def __init__(self, root: str, cache: str | None = None):
        """Paths are relative to `root`, which may be remote."""
        self._root, self._cache = root, cache

    def __call__(self, value: Any, key: str) -> bytes | np.ndarray:
        """Raises BadRecord where there is no image or its file cannot be read."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, (bytes, np.ndarray)):
            return value
        if not isinstance(value, str) or not value:
            raise BadRecord("no_image", key, repr(value)[:80])
        return self.read(value, key)

    def read(self, path: str, key: str) -> bytes:
        """The bytes of a file under the root. Raises BadRecord."""
        if not files.is_remote(path):
            path = f"{self._root}/{path}" if files.is_remote(self._root) else os.path.join(self._root, path)
        try:
            near = (
                shards.localize(path, self._cache) if files.is_remote(path) else contextlib.nullcontext(path)
            )
            with near as local:
                if files.is_special(local):  # opening a pipe waits until somebody writes to it
                    raise BadRecord("not_a_file", key, path)
                with open(local, "rb") as data:
                    return data.read()
        except FileNotFoundError as error:
            raise BadRecord("missing_file", key, path) from error
        except (OSError, DataError) as error:
            raise BadRecord("unreadable_file", key, str(error)) from error
        except ValueError as error:  # a NUL byte, or text that is no name of a file
            raise BadRecord("no_image", key, f"{path[:80]!r}: {error}") from error
