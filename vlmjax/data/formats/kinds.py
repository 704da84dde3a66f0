"""Which source reads which file: by the ending of its name."""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from vlmjax.data.formats import arrayrecord, tar, tfrecord
from vlmjax.data.formats.arrayrecord import ArrayRecordSource
from vlmjax.data.formats.arrow import ArrowSource
from vlmjax.data.formats.folder import TABLES, TableSource
from vlmjax.data.formats.parquet import ParquetSource
from vlmjax.data.formats.tfrecord import TFRecordSource
from vlmjax.data.formats.webdataset import TarSource
from vlmjax.errors import DataError

# TFDS numbers its files after the ending: name-train.tfrecord-00000-of-00010.
_NUMBERED = r"(?:-\d+-of-\d+)?(?:\.gz)?$"
_PATTERNS = {
    "tar": re.compile(r"\.(?:tar|tar\.gz|tgz)$"),
    "ArrayRecord": re.compile(r"\.array_?record(?:-\d+-of-\d+)?$"),
    "TFRecord": re.compile(r"\.tfrecords?" + _NUMBERED),
    "parquet": re.compile(r"\.parquet$"),
    "Arrow": re.compile(r"\.arrow$"),
    "table": re.compile("(?:" + "|".join(map(re.escape, TABLES)) + ")$", re.IGNORECASE),
}
_INDEXERS = {"tar": tar.index, "TFRecord": tfrecord.index, "ArrayRecord": arrayrecord.index}
_SOURCES = {
    "ArrayRecord": ArrayRecordSource,
    "TFRecord": TFRecordSource,
    "parquet": ParquetSource,
    "Arrow": ArrowSource,
}
EXPECTED = (
    ".tar, .tar.gz, .tgz, .array_record, .tfrecord, .parquet, .arrow, " + ", ".join(TABLES) + " or a folder"
)


def kind_of(path: str) -> str | None:
    """ "tar", "ArrayRecord", "TFRecord", "parquet", "Arrow" or "table" by the name of a file, None for others."""
    name = path.split("?")[0] if "://" in path else path
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.search(name)), None)


def builder(path: str) -> Callable[[str], Any]:
    """What makes the index of such a file. Raises DataError for files that need none, or are of no known kind."""
    kind = kind_of(path)
    if kind not in _INDEXERS:
        raise DataError(f"{path}: only {', '.join(_INDEXERS)} files have an index; expected one of them")
    return _INDEXERS[kind]


def shards_in(paths: Sequence[str]) -> list[str]:
    """The paths, with folders replaced by the shards in them that can be indexed, in order."""
    out = []
    for path in paths:
        if os.path.isdir(path):
            inside = (os.path.join(path, name) for name in sorted(os.listdir(path)))
            out += [file for file in inside if kind_of(file) in _INDEXERS]
        else:
            out.append(path)
    return out


def open_shards(paths: Sequence[str], *, name: str = "", cache: str | None = None, **table: Any) -> Any:
    """One source of files that are all of one kind.

    Args:
        paths: the files.
        name: of the source.
        cache: the cache folder.
        table: image_column, caption_columns, root, where there are columns.

    Raises:
        DataError: files of several kinds or of none, or what the source finds wrong.
    """
    found = {path: kind_of(path) for path in paths}
    odd = next((path for path, kind in found.items() if kind is None), None)
    if odd is not None:
        raise DataError(f"{odd}: not a kind of data; expected {EXPECTED}")
    kinds = sorted(set(found.values()))
    if len(kinds) > 1:
        raise DataError(
            f"{name}: files of several kinds ({', '.join(kinds)}); name them as parts of their own"
        )
    if kinds == ["tar"]:
        return TarSource(paths, name=name, cache=cache)
    if kinds == ["table"]:
        if len(paths) > 1:
            raise DataError(f"{name}: {len(paths)} tables; open them one by one")
        return TableSource(paths[0], cache=cache, **table)
    return _SOURCES[kinds[0]](paths, name=name, cache=cache, **table)
