"""TFRecord files of tf.train.Example at random, through an index of offsets, without TensorFlow."""

import os
import struct
from collections.abc import Sequence
from typing import Any

from vlmjax.data.formats import crc, rows, tfexample
from vlmjax.data.formats.webdataset import IndexedShards
from vlmjax.data.record import Record
from vlmjax.data.storage.samples import Samples, flatten
from vlmjax.errors import BadRecord, DataError

_HEAD, _TAIL = 12, 4
_READ_AHEAD = 1 << 14
_TRIED = 8  # records that may be damaged before one that shows what the features are


def index(path: str) -> Samples:
    """Where each record's data lie. Framing: length (uint64), its CRC (uint32), the data, their CRC (uint32).

    A file cut off or damaged in the middle gives the records before that, and a note.

    Raises:
        DataError: the file does not begin with a record.
    """
    groups, notes, at = [], [], 0
    with open(path, "rb", buffering=_READ_AHEAD) as file:
        length = os.fstat(file.fileno()).st_size
        while at < length:
            head = file.read(_HEAD)
            size = _size(head)
            if size is None or at + _HEAD + size + _TAIL > length:
                if not groups:
                    raise DataError(f"{path} is not a TFRecord file (its first length does not add up)")
                what = "damaged" if size is None and len(head) == _HEAD else "cut off"
                notes.append(f"{what} at byte {at}; using the {len(groups)} records before it")
                break
            groups.append(("", [("record", at + _HEAD, size)]))
            at += _HEAD + size + _TAIL
            file.seek(at)
    return flatten(groups, unit=1, notes=notes)


def _size(head: bytes) -> int | None:
    """The length in a record's head, None where its CRC does not fit."""
    if len(head) < _HEAD:
        return None
    size, stated = struct.unpack("<QI", head)
    return size if crc.masked(head[:8]) == stated else None


class TFRecordSource(IndexedShards):
    """Examples in TFRecord files, any of them at any time: an image feature and caption features by their usual names.

    Lists of one value are given as the value, `record.extra` is all other features.
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
    ):
        """Index the files.

        Args:
            paths: of the files; gzipped ones end in .gz.
            image_column, caption_columns: names of features that are not among the usual ones.
            root: folder of images, where the feature is a path.
            name: of the source.
            cache: the cache folder.

        Raises:
            DataError: unreadable, no TFRecord file, without records, or without the features wanted.
        """
        super().__init__(paths, index, name=name, cache=cache)
        self._load = rows.Loader(root or os.path.dirname(os.path.abspath(paths[0])), cache)
        if not len(self):
            raise DataError(f"{self.name}: {len(self.paths)} TFRecord file(s) hold no record")
        options = {"image_column": image_column, "caption_columns": caption_columns}
        self._layout = rows.find_layout(self.paths[0], self._first_row(), **options)

    def key(self, i: int) -> str:
        """File and number of record i."""
        shard, at = self.place(i)
        return f"{os.path.basename(self.paths[shard])}:{at}"

    def _first_row(self) -> dict[str, Any]:
        """The first record that can be read, of the first few. Raises DataError."""
        for i in range(min(len(self), _TRIED)):
            try:
                return self._row(i)
            except BadRecord as error:
                last = error
        raise DataError(f"{self.paths[0]}: its first records cannot be read: {last}") from last

    def _row(self, i: int) -> dict[str, Any]:
        shard, at = self.place(i)
        key = self.key(i)
        offset, size = self.samples(shard).parts(at)["record"]
        data = self._shards.read(shard, offset, size + _TAIL, key)
        payload, (stated,) = data[:size], struct.unpack("<I", data[size:])
        if crc.masked(payload) != stated:
            raise BadRecord(
                "bad_checksum", key, f"its {size} bytes at {offset} are not those that were written"
            )
        return tfexample.simple(tfexample.parse(payload, key))

    def __getitem__(self, i: int) -> Record:
        """Record i. Raises BadRecord."""
        return rows.record(self._row(i), self.key(i), self._layout, self._load)
