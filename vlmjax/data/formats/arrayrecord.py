"""ArrayRecord files at random: records of our own container, or tf.train.Example as TFDS writes them."""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from vlmjax.data.formats import container, rows, tfexample
from vlmjax.data.formats.webdataset import IndexedShards
from vlmjax.data.record import Record
from vlmjax.data.storage.samples import Samples, flatten
from vlmjax.errors import BadRecord, DataError

# One record per group: a larger group is read and unpacked whole for each of its records. JPEG does not compress.
WRITER_OPTIONS = "group_size:1,uncompressed"
_READERS = 64


def _module() -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise DataError(
            "ArrayRecord files need the package array_record, which there is for Linux: pip install array_record"
        ) from error
    return array_record_module


class Writer:
    """Writes records to one file: `with Writer(path) as out: out.write(record)`."""

    def __init__(self, path: str):
        """Begin the file."""
        self._writer = _module().ArrayRecordWriter(path, WRITER_OPTIONS)

    def write(self, record: Record) -> int:
        """Append a record; returns its number of bytes."""
        data = container.encode(record)
        self._writer.write(data)
        return len(data)

    def __enter__(self) -> "Writer":
        """Itself."""
        return self

    def __exit__(self, *failure: Any) -> None:
        """Finish the file: without this it cannot be read."""
        self._writer.close()


def write(path: str, records: Iterable[Record]) -> int:
    """Write a whole file; returns the number of records."""
    count = 0
    with Writer(path) as out:
        for record in records:
            out.write(record)
            count += 1
    return count


def _open(path: str) -> Any:
    """A reader. Raises DataError where the file is not whole, or something else."""
    try:
        reader = _module().ArrayRecordReader(path)
        if reader.ok():
            return reader
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(f"{path} is not a whole ArrayRecord file: {error}") from error
    raise DataError(f"{path} is not a whole ArrayRecord file")


def index(path: str) -> Samples:
    """How many records there are; the file itself knows where. Raises DataError."""
    with contextlib.closing(_open(path)) as reader:
        return flatten([("", [])] * reader.num_records(), unit=1)


class ArrayRecordSource(IndexedShards):
    """Examples in ArrayRecord files, any of them at any time: `source[i] -> Record`."""

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
        """Count the records. The columns are for files of tf.train.Example.

        Raises:
            DataError: unreadable, not whole, without records, or records of another kind.
        """
        super().__init__(paths, index, name=name, cache=cache)
        if not len(self):
            raise DataError(f"{self.name}: {len(self.paths)} ArrayRecord file(s) hold no record")
        self._readers: OrderedDict[int, tuple[Any, Any]] = OrderedDict()
        self._opening = threading.Lock()
        self._load = rows.Loader(root or os.path.dirname(os.path.abspath(paths[0])), cache)
        self._layout = None
        try:
            first = self._bytes(0)
            if first[:4] != container.MAGIC:
                row = tfexample.simple(tfexample.parse(first))
                options = {"image_column": image_column, "caption_columns": caption_columns}
                self._layout = rows.find_layout(self.paths[0], row, **options)
        except BadRecord as error:
            raise DataError(
                f"{self.paths[0]}: its first record is neither a tf.train.Example nor written by vlmjax: {error}"
            ) from error

    def _bytes(self, i: int) -> bytes:
        shard, at = self.place(i)
        try:
            reader, _ = self._reader(shard)
            return reader.read([at])[0]
        except (RuntimeError, ValueError, OSError, DataError, IndexError) as error:
            raise BadRecord(
                "unreadable_shard", self._spare_key(i), f"{self.paths[shard]}: {error}"
            ) from error

    def _reader(self, shard: int) -> tuple[Any, Any]:
        """An open reader with the copy it reads from, a bounded number of them."""
        with self._opening:
            found = self._readers.get(shard)
            if found is not None:
                self._readers.move_to_end(shard)
                return found
            while len(self._readers) >= self._shards.room(_READERS):  # before: what is held makes no room
                self._readers.popitem(last=False)
        path, copy = self._shards.file(shard)
        found = _open(path), copy
        with self._opening:
            self._readers[shard] = found
        return found

    def _spare_key(self, i: int) -> str:
        shard, at = self.place(i)
        return f"{os.path.basename(self.paths[shard])}:{at}"

    def key(self, i: int) -> str:
        """The key of record i, which is inside it; file and number where it has none."""
        if self._layout is not None:
            return self._spare_key(i)
        try:
            return container.decode(self._bytes(i)).key
        except BadRecord:
            return self._spare_key(i)

    def captions_at(self, i: int) -> tuple[str, ...]:
        """The captions of record i. Raises BadRecord."""
        return self[i].captions

    def __getitem__(self, i: int) -> Record:
        """Record i. Raises BadRecord."""
        data, key = self._bytes(i), self._spare_key(i)
        if self._layout is None:
            return container.decode(data, key)
        return rows.record(tfexample.simple(tfexample.parse(data, key)), key, self._layout, self._load)

    def __getstate__(self) -> dict[str, Any]:
        """A worker process opens readers of its own."""
        left = {name: value for name, value in super().__getstate__().items() if name != "_opening"}
        return left | {"_readers": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As it was, with nothing open."""
        super().__setstate__(state | {"_opening": threading.Lock()})
