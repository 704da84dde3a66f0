"""Images in a folder: listed by a jsonl, csv or tsv table, or with a text file beside each."""

import csv
import functools
import hashlib
import io
import json
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmjax.data.conversation import turns_in
from vlmjax.data.formats import rows
from vlmjax.data.formats.fields import IMAGE_EXTENSIONS, captions_of, parse_json, tidy
from vlmjax.data.record import Record
from vlmjax.data.storage import files, shards
from vlmjax.errors import BadRecord, DataError

_log = logging.getLogger(__name__)
TABLES = (".jsonl", ".json", ".csv", ".tsv")
_ENDS = 16  # images at either end of a table that are part of its fingerprint
_PREFERRED = ("metadata", "captions", "data", "index", "train")


def open_folder(folder: str, **options: Any) -> "TableSource | PairFolder":
    """The source a folder holds: its one table, or else images with text files beside them.

    A table that is not about images and captions, such as a list of licences, is passed over with a warning where
    there are images.

    Raises:
        DataError: several tables and no telling which, or no images.
    """
    tables = sorted(p for p in pathlib.Path(folder).iterdir() if p.suffix.lower() in TABLES)
    for name in _PREFERRED:
        chosen = [table for table in tables if table.stem == name]
        if len(tables) > 1 and len(chosen) == 1:
            tables = chosen
    if len(tables) > 1:
        raise DataError(
            f"{folder} holds several tables ({', '.join(t.name for t in tables[:5])}); name the one to read"
        )
    if not tables:
        return PairFolder(folder)
    try:
        return TableSource(str(tables[0]), **options)
    except rows.NoColumn as error:
        if options.get("image_column") or options.get("caption_columns"):
            raise
        try:
            images = PairFolder(folder)
        except DataError:
            raise error from None
        _log.warning("reading the images of %s, not its table: %s", folder, error)
        return images


class TableSource:
    """Rows of a jsonl, json, csv or tsv file, each with the path of an image and what belongs to it.

    Pairs (image, captions), LLaVA conversations and interleaved documents are told apart by their columns, see
    `rows`. Paths are relative to the table's folder (or to `root`). Columns are found by their usual names; say which
    when yours are called otherwise. `record.extra` is the rest of the row.
    """

    def __init__(
        self,
        path: str,
        *,
        image_column: str | None = None,
        caption_columns: Sequence[str] | str | None = None,
        root: str | None = None,
        name: str = "",
        cache: str | None = None,
    ):
        """Read the table (not the images).

        Raises:
            DataError: empty, damaged, or without the columns wanted (the message lists those there are).
        """
        self.path, self.name = path, name or path
        parent = (
            path.split("?")[0].rpartition("/")[0]
            if files.is_remote(path)
            else os.path.dirname(os.path.abspath(path))
        )
        self._load = rows.Loader(root or parent, cache)
        with shards.localize(path, cache) as local:
            lines = local.lower().endswith((".jsonl", ".json"))
            found = _read_json_lines(local) if lines else _read_delimited(local)
            with open(local, "rb") as data:
                digest = hashlib.file_digest(data, "sha256")
        if not found:
            raise DataError(f"{path} has no rows")
        first = next((row for row in found if isinstance(row, dict)), {})
        self._layout = rows.find_layout(
            path, first, image_column=image_column, caption_columns=caption_columns
        )
        self._rows = found
        digest.update(self._some_images(root or parent).encode("utf-8", "replace"))
        self.fingerprint = digest.hexdigest()[:16]

    def _some_images(self, root: str) -> str:
        """Names and sizes of the first and the last local images: the same table in another folder is other data."""
        ends = self._rows if len(self._rows) <= 2 * _ENDS else [*self._rows[:_ENDS], *self._rows[-_ENDS:]]
        values = [row.get(self._layout.image) for row in ends if isinstance(row, dict)]
        names = [name for name in values if isinstance(name, str) and name and not files.is_remote(name)]
        if files.is_remote(root):
            return ""
        return "".join(f"{name}|{_size(os.path.join(root, name))}\n" for name in names)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def key(self, i: int) -> str:
        """The `key` (or `id`) column of row i, or its image path."""
        row = self._rows[i]
        if not isinstance(row, dict):
            return f"row {i + 1}"
        image, other = row.get(self._layout.image), row.get(self._layout.key)
        if self._layout.key != "key" and self._layout.kind == "pairs":
            other = (
                image  # an id may repeat in tables of captions; the path of the image is what people look for
            )
        return str(other) if isinstance(other, (str, int)) and other != "" else f"row {i + 1}"

    def captions_at(self, i: int) -> tuple[str, ...]:
        """The captions of row i, without its image. Raises BadRecord."""
        if self._layout.kind != "pairs" or not isinstance(self._rows[i], dict):
            return self[i].captions
        row = self._rows[i]
        return tidy(
            [text for column in self._layout.captions for text in captions_of(row.get(column), self.key(i))]
        )

    def turns_at(self, i: int) -> list[dict[str, str]]:
        """The conversation of row i, without its images; none of a pair or a document. Raises BadRecord."""
        if self._layout.kind != rows.CONVERSATIONS or not isinstance(self._rows[i], dict):
            return []
        return rows.turns_of(self._rows[i], self.key(i), self._layout)

    def __getitem__(self, i: int) -> Record:
        """Row i with its image's bytes. Raises BadRecord for a bad row or a missing image."""
        row, key = self._rows[i], self.key(i)
        if not isinstance(row, dict):
            raise BadRecord("bad_row", key, str(row)[:80])
        return rows.record(row, key, self._layout, self._load)


class PairFolder:
    """Images, in subfolders too, with captions beside them: `dog.jpg` with `dog.txt` (one) or `dog.json`."""

    def __init__(self, folder: str, *, name: str = ""):
        """List the folder. Raises DataError when there is no image in it."""
        self.name, self._folder = name or folder, folder
        self._load = rows.Loader(folder)
        listed = [
            os.path.relpath(os.path.join(where, file), folder)
            for where, _, found in os.walk(folder)
            for file in found
            if not file.startswith(".")
        ]
        self._images = sorted(p for p in listed if p.rpartition(".")[2].lower() in IMAGE_EXTENSIONS)
        stems = {os.path.splitext(path)[0] for path in self._images}
        self._texts = sorted(
            p for p in listed if p.endswith((".txt", ".json")) and p[: p.rindex(".")] in stems
        )
        if not self._images:
            raise DataError(
                f"{folder} holds neither a table ({', '.join(TABLES)}), nor tar files, nor images"
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with the names and the sizes of the images and of what is written beside them."""
        digest = hashlib.sha256()
        for path in (*self._images, *self._texts):
            digest.update(
                f"{path}|{_size(os.path.join(self._folder, path))}\n".encode("utf-8", "surrogateescape")
            )
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def key(self, i: int) -> str:
        """The path of image i inside the folder, without its extension."""
        return os.path.splitext(self._images[i])[0]

    def __getitem__(self, i: int) -> Record:
        """Image i and what is written beside it. Raises BadRecord when it cannot be read."""
        return Record(self.key(i), self._load(self._images[i], self.key(i)), self.captions_at(i))

    def captions_at(self, i: int) -> tuple[str, ...]:
        """The captions of image i, without its pixels. Raises BadRecord."""
        key, captions = self.key(i), []
        stem = os.path.join(self._folder, key)
        if os.path.exists(stem + ".txt"):
            captions.append(self._load.read(key + ".txt", key).decode("utf-8", "replace"))
        if os.path.exists(stem + ".json"):
            captions += captions_of(parse_json(self._load.read(key + ".json", key), key), key)
        return tidy(captions)


def _size(path: str) -> int:
    """Bytes of a file; -1 for one that cannot be asked, as a broken link, which is counted when it is read."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1


def _read_json_lines(path: str) -> list[Any]:
    """Rows of a jsonl file (a damaged line stays as text, to be counted later) or of one json list."""
    text = _text(path)
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not a json list: {error}") from error
    # Not splitlines: a caption may hold other line separators, such as U+2028, and stays one row.
    return [_line(line) for line in text.split("\n") if line.strip()]


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def _read_delimited(path: str) -> list[dict[str, Any]]:
    delimiter = "\t" if path.lower().endswith(".tsv") else ","
    quoting = csv.QUOTE_NONE if delimiter == "\t" and not _has_quotes(path) else csv.QUOTE_MINIMAL
    try:
        return list(
            csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=delimiter, quoting=quoting)
        )
    except csv.Error as error:
        raise DataError(f"{path} is damaged: {error}") from error


def _has_quotes(path: str) -> bool:
    """True when a tsv quotes whole fields; a lone quote in a caption must not swallow the lines after it."""
    return any(
        field.startswith('"') and field.rstrip("\r").endswith('"')
        for line in _text(path).split("\n")
        for field in line.split("\t")
    )


def _text(path: str) -> str:
    """A whole table as text, as UTF-8 with or without a byte order mark."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as data:
            return data.read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}): save it as UTF-8, e.g. "
            "iconv -f latin1 -t utf-8"
        ) from None


class Subset:
    """Some rows of another source, in the order given."""

    def __init__(self, source: Any, rows: np.ndarray):
        """`rows` are indices into `source`; where they ascend, its blocks go on to count."""
        self._source, self._rows = source, rows
        self.name = source.name
        digest = hashlib.sha256(f"{source.fingerprint}|{len(rows)}".encode() + rows.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()[:16]
        ends = getattr(source, "blocks", None)
        ascending = ends is not None and bool((np.diff(rows) > 0).all())
        self.blocks = np.unique(np.searchsorted(rows, ends)) if ascending else None
        if self.blocks is not None and self.blocks[0] == 0:
            self.blocks = self.blocks[1:]

    def __len__(self) -> int:
        """Number of rows kept."""
        return len(self._rows)

    def key(self, i: int) -> str:
        """The key of row i, without reading it."""
        return self._source.key(int(self._rows[i]))

    def captions_at(self, i: int) -> tuple[str, ...]:
        """The captions of row i."""
        captions, row = getattr(self._source, "captions_at", None), int(self._rows[i])
        return captions(row) if captions else self._source[row].captions

    def turns_at(self, i: int) -> list[dict[str, str]]:
        """The conversation of row i, none where it has none."""
        turns, row = getattr(self._source, "turns_at", None), int(self._rows[i])
        if turns:
            return turns(row)
        record = self._source[row]
        return turns_in(record.extra, record.key)

    def column(self, name: str) -> np.ndarray | None:
        """A column of the index of the source, where it has one."""
        column = getattr(self._source, "column", None)
        values = column(name) if column else None
        return None if values is None else values[self._rows]

    def prepare(self, indices: Any) -> None:
        """Begin to download what these rows are in."""
        prepare = getattr(self._source, "prepare", None)
        if prepare:
            prepare(self._rows[np.asarray(indices)])

    def __getitem__(self, i: int) -> Record:
        """Row i."""
        return self._source[int(self._rows[i])]
