"""Hugging Face datasets on disk: Arrow files mapped into memory, read at random, without the `datasets` package."""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmjax.data.formats import rows
from vlmjax.data.formats.fields import captions_of, tidy
from vlmjax.data.record import Record
from vlmjax.data.storage import shard_index
from vlmjax.data.storage.shards import Shards
from vlmjax.errors import BadRecord, DataError

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_TRIED = 16  # rows looked at for what the columns mean, where the first are damaged
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream; one of Arrow before 0.15 begins and ends otherwise
_log = logging.getLogger(__name__)


def arrow() -> Any:
    """The package pyarrow. Raises DataError without it."""
    try:
        import pyarrow
    except ImportError as error:
        raise DataError("Arrow and parquet files need pyarrow: pip install pyarrow") from error
    return pyarrow


def is_dataset(folder: str) -> bool:
    """True for a folder that `datasets`' save_to_disk wrote, of one split or of several."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in (_STATE, _SPLITS))


def files_of(folder: str) -> list[str]:
    """The Arrow files of a saved dataset in order; of several splits, "train" or the only one.

    Raises:
        DataError: several splits and no "train", or a folder that is not whole.
    """
    try:
        if os.path.isfile(os.path.join(folder, _SPLITS)):
            with open(os.path.join(folder, _SPLITS), encoding="utf-8") as file:
                splits = json.load(file)["splits"]
            if len(splits) > 1 and "train" not in splits:
                raise DataError(
                    f"{folder} holds the splits {', '.join(splits)}: name one, as {folder}/{splits[0]}"
                )
            folder = os.path.join(folder, "train" if "train" in splits else splits[0])
        with open(os.path.join(folder, _STATE), encoding="utf-8") as file:
            state = json.load(file)
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise DataError(
                f"{folder} keeps its order in a file of indices: save it anew after flatten_indices()"
            )
        return [os.path.join(folder, entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{folder} is not a whole dataset of save_to_disk: {error!r}") from error


class ColumnSource:
    """Rows of Arrow tables in several files: what mapped Arrow files and parquet have in common."""

    name: str
    paths: list[str]
    _ends: np.ndarray
    _layout: rows.Layout
    _load: rows.Loader

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def _batch(self, block: int, columns: Sequence[str] | None) -> Any:
        """The table or batch of one block of rows, with these columns at least. Raises BadRecord."""
        raise NotImplementedError

    def _place(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name}: no row {i}, there are {len(self)}")
        block = int(np.searchsorted(self._ends, i, side="right"))
        return block, i - (int(self._ends[block - 1]) if block else 0)

    def _row(self, i: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        block, at = self._place(i)
        batch = self._batch(block, columns)
        if columns is not None:
            batch = batch.select(list(columns))
        return self._values(batch.slice(at, 1), i)

    def _values(self, row: Any, i: int) -> dict[str, Any]:
        """The values of row i. Raises BadRecord for text that is not UTF-8, dates out of range and the like."""
        try:
            return row.to_pylist()[0]
        except UnicodeDecodeError as error:
            raise BadRecord("bad_text", self._name_row(None, i), f"{self.name}: {error}") from error
        except (ValueError, OverflowError, arrow().ArrowException) as error:
            raise BadRecord("bad_row", self._name_row(None, i), f"{self.name}: {error}") from error

    def key(self, i: int) -> str:
        """The key (or id) column of row i; file and number without one."""
        column = self._layout.key
        return self._name_row(self._row(i, [column]).get(column) if column else None, i)

    def _name_row(self, value: Any, i: int) -> str:
        spare = f"{os.path.basename(self.name.rstrip('/'))}:{i}"  # the same wherever the files lie
        return str(value) if isinstance(value, (str, int)) and value != "" else spare

    def captions_at(self, i: int) -> tuple[str, ...]:
        """The captions of row i, without its image. Raises BadRecord."""
        if self._layout.kind != "pairs":
            return self[i].captions
        row = self._row(i, self._layout.captions)
        return tidy(
            [text for column in self._layout.captions for text in captions_of(row.get(column), str(i))]
        )

    def __getitem__(self, i: int) -> Record:
        """Row i. Raises BadRecord."""
        row, column = self._row(i), self._layout.key
        key = self._name_row(row.get(column) if column else None, i)
        return rows.record(row, key, self._layout, self._load)

    def _find_layout(self, image_column: str | None, caption_columns: Sequence[str] | str | None) -> None:
        if not len(self):
            raise DataError(f"{self.name} has no rows")
        first = self._first_whole_row()
        self._layout = rows.find_layout(
            self.name, first, image_column=image_column, caption_columns=caption_columns
        )

    def _first_whole_row(self) -> dict[str, Any]:
        """Of the first rows, and of those with which the first blocks begin. Raises DataError where none is whole."""
        failure = None
        for i in dict.fromkeys([*range(min(_TRIED, len(self))), *self._ends[: _TRIED - 1].tolist()]):
            if i >= len(self) or (failure and failure[0] == self._place(i)[0]):
                continue
            try:
                return self._row(i)
            except BadRecord as error:
                # What cannot be read at all is not tried again: that takes as long as the block is large.
                failure = (self._place(i)[0] if error.reason == "unreadable_shard" else -1), error
        raise DataError(f"{self.name}: its first rows cannot be read: {failure[1]}") from failure[1]


class ArrowSource(ColumnSource):
    """Rows of Arrow files (streams or IPC files), as `datasets` keeps them: `source[i] -> Record`."""

    def __init__(
        self,
        paths: Sequence[str],
        *,
        image_column: str | None = None,
        caption_columns: Sequence[str] | str | None = None,
        root: str | None = None,
        name: str = "",
        cache: str | None = None,
    ):
        """Map the files. Images are bytes, structs of bytes and path, or paths relative to `root`.

        Raises:
            DataError: unreadable, damaged, without rows, or without the columns wanted.
        """
        self.paths, self.name, self._shards = list(paths), name or paths[0], Shards(paths, cache)
        self._load = rows.Loader(root or os.path.dirname(os.path.abspath(paths[0])), cache)
        self._mapping, self._batches, self._copies = threading.Lock(), None, []
        self._whole: dict[int, bool] = {}
        self._shards.must_fit_together()
        batches = self._all()
        self._ends = np.cumsum([batch.num_rows for _, batch in batches], dtype=np.int64)
        digest = hashlib.sha256()
        for i, path in enumerate(self.paths):
            digest.update(f"{os.path.basename(path)}|{shard_index.probe(self._shards.file(i)[0])}".encode())
        self.fingerprint = digest.hexdigest()[:16]
        self._find_layout(image_column, caption_columns)

    def _all(self) -> list[tuple[int, Any]]:
        """(file, batch) of all batches, whose bytes stay on disk until they are looked at."""
        with self._mapping:
            if self._batches is None:
                self._batches = [(i, batch) for i in range(len(self.paths)) for batch in self._mapped(i)]
        return self._batches

    def _mapped(self, i: int) -> list[Any]:
        package = arrow()
        try:
            # A mapping outlives the file's removal, and would take room then that the cache knows nothing of.
            path, copy = self._shards.file(i)
            self._copies.append(copy)
            data = package.memory_map(path)
            try:
                batches = list(package.ipc.open_stream(data))
                self._warn_of_cut(i, data)
                return batches
            except package.ArrowInvalid:
                file = package.ipc.open_file(data)
                return [file.get_batch(n) for n in range(file.num_record_batches)]
        except (OSError, ValueError, MemoryError, package.ArrowException) as error:
            raise DataError(f"{self.paths[i]} is not a whole Arrow file: {error}") from error

    def _warn_of_cut(self, i: int, data: Any) -> None:
        """`data` is a stream that has been read: where it was cut between two batches, nothing else tells."""
        at = data.tell()
        data.seek(0)
        modern = data.read(4) == _END[:4]
        data.seek(max(0, at - len(_END)))
        if modern and data.read(len(_END)) != _END:
            _log.warning("%s is cut off: it has no end mark; the rows before that are used", self.paths[i])

    def _batch(self, block: int, columns: Sequence[str] | None) -> Any:
        return self._all()[block][1]

    def _row(self, i: int, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """Nothing is looked at before its offsets are known to lie inside it: a wrong one ends the process."""
        block, at = self._place(i)
        batch = self._batch(block, None)
        if block not in self._whole:  # once per batch; it reads offsets and text, not images
            self._whole[block] = not _complaint(batch)
        if not self._whole[block]:
            row = batch.slice(at, 1)
            complaint = _complaint(row if columns is None else row.select(list(columns)))
            if complaint:
                reason = "bad_text" if "UTF8" in complaint else "bad_row"
                raise BadRecord(reason, self._name_row(None, i), f"{self.name}: {complaint}")
        return super()._row(i, columns)

    def __getstate__(self) -> dict[str, Any]:
        """A worker process maps the files itself."""
        return self.__dict__ | {"_mapping": None, "_batches": None, "_copies": [], "_whole": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As it was, with nothing mapped."""
        self.__dict__.update(state, _mapping=threading.Lock())


def _complaint(batch: Any) -> str:
    """What is wrong: an offset outside its buffer, text that is not UTF-8; "" for a sound batch."""
    try:
        batch.validate(full=True)
    except (ValueError, arrow().ArrowException) as error:
        return str(error) or repr(error)
    return ""
