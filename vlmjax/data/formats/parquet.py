"""Parquet files: rows by number, a row group at a time, shuffled in blocks since single rows are dear."""

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vlmjax.data.formats import rows
from vlmjax.data.formats.arrow import ColumnSource, arrow
from vlmjax.data.storage import files, remote
from vlmjax.data.storage.shards import Shards
from vlmjax.errors import BadRecord, DataError

CACHE_BYTES = 2 << 30
_Part = tuple[int, tuple[str, ...]]  # a row group and its columns, () for all
_SPLITS = re.compile(r"^(train|test|val|valid|validation|dev)\b", re.IGNORECASE)


def files_of(folder: str) -> list[str]:
    """The parquet files of a folder or of its subfolder `data`, where the Hugging Face hub puts them.

    Raises:
        DataError: files of several splits.
    """
    for place in (folder, os.path.join(folder, "data")):
        if not os.path.isdir(place):
            continue
        names = sorted(name for name in os.listdir(place) if name.endswith(".parquet"))
        splits = {match[1] for name in names if (match := _SPLITS.match(name))}
        if len(splits) > 1:
            first = "train" if "train" in splits else min(splits)
            raise DataError(
                f"{place} holds the splits {', '.join(sorted(splits))}: name one, as {place}/{first}-*.parquet"
            )
        if names:
            return [os.path.join(place, name) for name in names]
    return []


def _column_sizes(footer: Any) -> list[int]:
    """Compressed bytes of every column of every row group: hardly the same for other data."""
    groups = [footer.row_group(g) for g in range(footer.num_row_groups)]
    return [g.column(c).total_compressed_size for g in groups for c in range(g.num_columns)]


class ParquetSource(ColumnSource):
    """Rows of parquet files: `source[i] -> Record`.

    A row is read with its whole row group, which is kept for the next ones, within a bound of memory: the order should
    come from few groups at a time, see `blocks`.

    Attributes:
        blocks: int64 [row groups], where the rows of each group end.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        image_column: str | None = None,
        caption_columns: Sequence[str] | str | None = None,
        root: str | None = None,
        name: str = "",
        cache: str | None = None,
        cache_bytes: int = CACHE_BYTES,
    ):
        """Read the files' footers. `cache_bytes` bounds the row groups in memory (at least one is kept).

        Raises:
            DataError: unreadable, damaged, without rows, or without the columns wanted.
        """
        self.paths, self.name, self._shards = list(paths), name or paths[0], Shards(paths, cache)
        self._load = rows.Loader(root or os.path.dirname(os.path.abspath(paths[0])), cache)
        self._limit, self._lock = cache_bytes, threading.Lock()
        self._kept: OrderedDict[_Part, Any] = OrderedDict()
        self._gates: dict[_Part, threading.Lock] = {}
        self._groups: list[tuple[int, int]] = []
        counts, digest = [], hashlib.sha256()
        with ThreadPoolExecutor(min(16, len(self.paths))) as pool:
            footers = list(pool.map(self._footer, range(len(self.paths))))
        for i, (path, footer) in enumerate(zip(self.paths, footers, strict=True)):
            sizes = [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]
            self._groups += [(i, g) for g, size in enumerate(sizes) if size]
            counts += [size for size in sizes if size]
            digest.update(f"{os.path.basename(path)}|{sizes}|{_column_sizes(footer)}".encode())
        self._ends = self.blocks = np.cumsum(counts, dtype=np.int64)
        self.fingerprint = digest.hexdigest()[:16]
        self._find_layout(image_column, caption_columns)

    def _footer(self, i: int) -> Any:
        """What a file holds; of one in a bucket only its end is read."""
        path = self.paths[i]
        if not files.is_remote(path) or path.startswith(("http://", "https://")):
            return self._open(i).metadata
        package = arrow()
        from pyarrow import parquet

        def attempt() -> Any:
            system, inner = remote.filesystem(path)
            with system.open(inner, "rb") as file:
                try:
                    return parquet.read_metadata(file)
                except package.ArrowInvalid as error:
                    raise DataError(f"{path} is not a whole parquet file: {error}") from error

        return remote.retrying(f"read the end of {path}", attempt)

    def _open(self, i: int) -> Any:
        package = arrow()
        from pyarrow import parquet

        try:
            with self._shards.held(
                i
            ) as local:  # once open it can be read to the end, whatever becomes of its name
                return parquet.ParquetFile(local)
        except (OSError, ValueError, package.ArrowException) as error:
            raise DataError(f"{self.paths[i]} is not a whole parquet file: {error}") from error

    def _batch(self, block: int, columns: Sequence[str] | None) -> Any:
        """All of a group, where it is kept; else only the columns wanted, which are far smaller than the images."""
        part = block, tuple(columns or ())
        kept = self._look(part)
        if kept is not None:
            return kept
        with self._lock:
            gate = self._gates.setdefault(part, threading.Lock())
        with gate:
            kept = self._look(part)
            if kept is None:
                kept = self._read(*part)
                self._keep(part, kept)
        return kept

    def _look(self, part: _Part) -> Any:
        with self._lock:
            for name in ((part[0], ()), part):
                if name in self._kept:
                    self._kept.move_to_end(name)
                    return self._kept[name]
        return None

    def _keep(self, part: _Part, table: Any) -> None:
        with self._lock:
            self._kept[part] = table
            self._gates.pop(part, None)
            while len(self._kept) > 1 and sum(t.nbytes for t in self._kept.values()) > self._limit:
                self._kept.popitem(last=False)

    def _read(self, block: int, columns: tuple[str, ...]) -> Any:
        file, group = self._groups[block]
        package = arrow()
        try:
            open_file = self._open(file)
            return open_file.read_row_group(group, list(columns) or None, use_threads=False).combine_chunks()
        except (OSError, ValueError, DataError, package.ArrowException) as error:
            raise BadRecord(
                "unreadable_shard", f"{self.name}:{block}", f"{self.paths[file]}: {error}"
            ) from error

    def prepare(self, indices: Sequence[int] | np.ndarray) -> None:
        """Begin to download the files these rows are in; does not wait for them."""
        if self._shards.remote:
            blocks = np.searchsorted(self._ends, np.asarray(indices, np.int64), side="right")
            self._shards.prepare(self._groups[block][0] for block in dict.fromkeys(blocks.tolist()))

    def __getstate__(self) -> dict[str, Any]:
        """A worker process reads groups of its own."""
        return self.__dict__ | {"_lock": None, "_kept": OrderedDict(), "_gates": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As it was, with nothing read."""
        self.__dict__.update(state, _lock=threading.Lock())
