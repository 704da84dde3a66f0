"""Hugging Face datasets on disk: Arrow files mapped into memory, read at random, without the `datasets` package."""

import hashlib
import json
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
        return batch.slice(at, 1).to_pylist()[0]

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
        return tidy([text for column in self._layout.captions for text in captions_of(row.get(column))])

    def __getitem__(self, i: int) -> Record:
        """Row i. Raises BadRecord."""
        row, column = self._row(i), self._layout.key
        key = self._name_row(row.get(column) if column else None, i)
        return rows.record(row, key, self._layout, self._load)

    def _find_layout(self, image_column: str | None, caption_columns: Sequence[str] | str | None) -> None:
        if not len(self):
            raise DataError(f"{self.name} has no rows")
        try:
            first = self._row(0)
        except BadRecord as error:
            raise DataError(f"{self.name}: its first row cannot be read: {error}") from error
        self._layout = rows.find_layout(
            self.name, first, image_column=image_column, caption_columns=caption_columns
        )


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
                return list(package.ipc.open_stream(data))
            except package.ArrowInvalid:
                file = package.ipc.open_file(data)
                return [file.get_batch(n) for n in range(file.num_record_batches)]
        except (OSError, package.ArrowInvalid) as error:
            raise DataError(f"{self.paths[i]} is not a whole Arrow file: {error}") from error

    def _batch(self, block: int, columns: Sequence[str] | None) -> Any:
        return self._all()[block][1]

    def __getstate__(self) -> dict[str, Any]:
        """A worker process maps the files itself."""
        return self.__dict__ | {"_mapping": None, "_batches": None, "_copies": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As it was, with nothing mapped."""
        self.__dict__.update(state, _mapping=threading.Lock())
