"""Images in a folder: listed by a jsonl, csv or tsv table, or with a text file beside each."""

import csv
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmjax.data import files
from vlmjax.data.record import Record
from vlmjax.data.webdataset import IMAGE_EXTENSIONS, captions_of, tidy
from vlmjax.errors import BadRecord, DataError

TABLES = (".jsonl", ".json", ".csv", ".tsv")
IMAGE_COLUMNS = (
    "image image_path file_name filename filepath file_path path file img image_file picture".split()
)
CAPTION_COLUMNS = "caption captions text texts sentence sentences title description alt_text".split()
_PREFERRED = ("metadata", "captions", "data", "index", "train")


def open_folder(folder: str, **options: Any) -> "TableSource | PairFolder":
    """The source a folder holds: its one table, or else images with text files beside them.

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
    return TableSource(str(tables[0]), **options) if tables else PairFolder(folder)


class TableSource:
    """Rows of a jsonl, json, csv or tsv file, each with the path of an image and its caption or captions.

    Paths are relative to the table's folder (or to `root`). Columns are found by their usual names; say which
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
    ):
        """Read the table (not the images).

        Raises:
            DataError: empty, damaged, or without the columns wanted (the message lists those there are).
        """
        self.path, self.name = path, name or path
        self._root = root or os.path.dirname(os.path.abspath(path))
        rows = _read_json_lines(path) if path.lower().endswith((".jsonl", ".json")) else _read_delimited(path)
        if not rows:
            raise DataError(f"{path} has no rows")
        first = next((row for row in rows if isinstance(row, dict)), {})
        wanted = [caption_columns] if isinstance(caption_columns, str) else list(caption_columns or ())
        self._image = _column(
            path, first, [image_column] if image_column else IMAGE_COLUMNS, "an image", "image_column"
        )
        self._captions = wanted or [_column(path, first, CAPTION_COLUMNS, "a caption", "caption_columns")]
        for column in self._captions:
            _column(path, first, [column], "a caption", "caption_columns")
        self._rows = rows
        with open(path, "rb") as data:
            self.fingerprint = hashlib.file_digest(data, "sha256").hexdigest()[:16]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def key(self, i: int) -> str:
        """The `key` column of row i, or its image path."""
        row = self._rows[i]
        if not isinstance(row, dict):
            return f"row {i + 1}"
        return str(row.get("key") or row.get(self._image) or f"row {i + 1}")

    def __getitem__(self, i: int) -> Record:
        """Row i with its image's bytes. Raises BadRecord for a bad row or a missing image."""
        row, key = self._rows[i], self.key(i)
        if not isinstance(row, dict):
            raise BadRecord("bad_row", key, str(row)[:80])
        place = row.get(self._image)
        if not isinstance(place, str) or not place:
            raise BadRecord("no_image", key, f"column {self._image} is {place!r}")
        captions = [text for column in self._captions for text in captions_of(row.get(column))]
        extra = {
            name: value for name, value in row.items() if name != self._image and name not in self._captions
        }
        return Record(key, _read(os.path.join(self._root, place), key), tidy(captions), extra)


class PairFolder:
    """Images, in subfolders too, with captions beside them: `dog.jpg` with `dog.txt` (one) or `dog.json`."""

    def __init__(self, folder: str, *, name: str = ""):
        """List the folder. Raises DataError when there is no image in it."""
        self.name, self._folder = name or folder, folder
        self._images = sorted(
            os.path.relpath(os.path.join(where, file), folder)
            for where, _, found in os.walk(folder)
            for file in found
            if file.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not file.startswith(".")
        )
        if not self._images:
            raise DataError(
                f"{folder} holds neither a table ({', '.join(TABLES)}), nor tar files, nor images"
            )

    @property
    def fingerprint(self) -> str:
        """Changes with the list of images."""
        return hashlib.sha256("\n".join(self._images).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def key(self, i: int) -> str:
        """The path of image i inside the folder, without its extension."""
        return os.path.splitext(self._images[i])[0]

    def __getitem__(self, i: int) -> Record:
        """Image i and what is written beside it. Raises BadRecord when it cannot be read."""
        key, captions = self.key(i), []
        stem = os.path.join(self._folder, key)
        if os.path.exists(stem + ".txt"):
            captions.append(_read(stem + ".txt", key).decode("utf-8", "replace"))
        if os.path.exists(stem + ".json"):
            try:
                captions += captions_of(json.loads(_read(stem + ".json", key)))
            except ValueError as error:
                raise BadRecord("bad_json", key, str(error)) from error
        return Record(key, _read(os.path.join(self._folder, self._images[i]), key), tidy(captions))


def _read(path: str, key: str) -> bytes:
    try:
        if files.is_remote(path):
            path = files.localize(path)
        with open(path, "rb") as data:
            return data.read()
    except FileNotFoundError as error:
        raise BadRecord("missing_file", key, path) from error
    except (OSError, DataError) as error:
        raise BadRecord("unreadable_file", key, str(error)) from error


def _column(path: str, row: dict[str, Any], names: Sequence[str], what: str, option: str) -> str:
    """The first of `names` that the table has; case does not matter unless two columns differ in it."""
    folded = {str(column).strip().lower(): column for column in row}
    for name in names:
        if name in row:
            return name
        if name.lower() in folded:
            return folded[name.lower()]
    have, wanted = ", ".join(map(str, row)) or "none", ", ".join(names)
    raise DataError(
        f"{path} has no column for {what}: looked for {wanted}; it has {have}; rename its column, or in Python "
        f"name it with {option}"
    )


def _read_json_lines(path: str) -> list[Any]:
    """Rows of a jsonl file (a damaged line stays as text, to be counted later) or of one json list."""
    text = _text(path)
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError as error:
            raise DataError(f"{path} is not a json list: {error}") from error
    # Not splitlines: a caption may hold other line separators, such as U+2028, and stays one row.
    return [_line(line) for line in text.split("\n") if line.strip()]


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
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
        """`rows` are indices into `source`."""
        self._source, self._rows = source, rows
        self.name = source.name
        digest = hashlib.sha256(f"{source.fingerprint}|{len(rows)}".encode() + rows.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        """Number of rows kept."""
        return len(self._rows)

    def key(self, i: int) -> str:
        """The key of row i, without reading it."""
        return self._source.key(int(self._rows[i]))

    def __getitem__(self, i: int) -> Record:
        """Row i."""
        return self._source[int(self._rows[i])]
