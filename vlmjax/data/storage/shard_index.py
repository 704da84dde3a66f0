"""The index of one shard: where each sample's bytes lie, how large its image is; kept in a small file beside it."""

import contextlib
import hashlib
import json
import logging
import mmap
import os
import pathlib
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vlmjax.data.storage import files
from vlmjax.data.storage.samples import Samples, narrow
from vlmjax.errors import DataError

ENDING = ".index"
_MAGIC = b"vlmjIDX\x01"
_LONGEST_HEADER = 1 << 24
_PROBES = 5
_PROBE_BYTES = 1024
_MAPS = 8192  # open at a time; Linux allows 65,530 mappings to a process
_log = logging.getLogger(__name__)


class Damaged(Exception):
    """A side file that is no index, or not a whole one."""


@dataclass(frozen=True)
class ShardIndex:
    """What is known of one shard without reading it; the arrays are mapped from the side file when first used.

    Attributes:
        count: number of samples.
        digest: of the samples' keys and sizes.
        size: of the shard in bytes.
        probe: hash of the shard's bytes at `probe_at`, which ties the index to it.
        columns: names of the columns.
        notes: what is wrong with the shard.
        path: the side file, "" when the index is only in memory.
        snapshot: where in the cache to keep a copy for mapping, for side files that are not in the cache.
    """

    count: int
    digest: str
    size: int
    probe: str
    probe_at: tuple[int, ...]
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    path: str = ""
    snapshot: str = ""
    layout: dict[str, Any] = field(default_factory=dict, repr=False)
    kept: Samples | None = field(default=None, repr=False)

    def fits(self, shard: str | int) -> bool:
        """True when the local file (path or descriptor) is the one indexed: its size, and bytes all over it."""
        return os.path.getsize(shard) == self.size and probe(shard, self.probe_at) == self.probe

    def samples(self) -> Samples:
        """The arrays. Raises Damaged or OSError where the side file is no longer as it was."""
        return self.kept if self.kept is not None else _MAPPED.get(self)


def describe(shard: str, samples: Samples) -> ShardIndex:
    """An index in memory of the local file `shard`.

    The bytes probed are headers of members with their first contents: the end of a tar is the same in all of them.
    """
    count, size = len(samples.offset), os.path.getsize(shard)
    if count:
        chosen = sorted({count * i // (_PROBES - 1) for i in range(_PROBES - 1)} | {count - 1})
        places = tuple(max(0, int(samples.offset[j]) * samples.unit - _PROBE_BYTES // 2) for j in chosen)
    else:
        places = _spread(size)
    return ShardIndex(
        count=samples.count,
        digest=samples.digest(),
        size=size,
        probe=probe(shard, places),
        probe_at=places,
        columns=tuple(samples.columns),
        notes=samples.notes,
        kept=samples,
    )


def probe(shard: str | int, places: Sequence[int] | None = None) -> str:
    """Hash of a file's bytes at some places; without them, of its length and bytes all over it. Raises OSError."""
    digest = hashlib.blake2b(digest_size=16)
    descriptor = os.dup(shard) if isinstance(shard, int) else os.open(shard, os.O_RDONLY)
    try:
        if places is None:
            size = os.fstat(descriptor).st_size
            digest.update(str(size).encode())
            places = _spread(size)
        for place in places:
            digest.update(os.pread(descriptor, _PROBE_BYTES, place))
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _spread(size: int) -> tuple[int, ...]:
    return tuple(max(0, size * i // (_PROBES - 1) - _PROBE_BYTES) for i in range(_PROBES))


def save(index: ShardIndex, path: str | os.PathLike[str]) -> ShardIndex:
    """Write the side file in one stroke and return the index that reads from it. Raises OSError."""
    samples = index.samples()
    arrays = {name: getattr(samples, name) for name in Samples._fields[:6]}
    arrays |= {f"column:{name}": values for name, values in samples.columns.items()}
    table, blocks, at = {}, [], 0
    for name, values in arrays.items():
        data = np.ascontiguousarray(values).tobytes()
        data += b"\0" * (-len(data) % 8)
        table[name] = [values.dtype.str, len(values), at]
        blocks.append(data)
        at += len(data)
    payload = b"".join(blocks)
    layout = {"arrays": table, "extensions": samples.extensions, "unit": samples.unit, "bytes": len(payload)}
    layout["crc"] = zlib.crc32(payload)
    facts = {
        name: getattr(index, name)
        for name in ("count", "digest", "size", "probe", "probe_at", "columns", "notes")
    }
    header = json.dumps({"shard": facts, **layout}).encode()
    header += b" " * (-len(header) % 8)
    whole = b"".join([_MAGIC, struct.pack("<II", len(header), zlib.crc32(header)), header, payload])
    write_whole(path, whole)
    return load(path)


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that its name never stands for a part of it. Raises OSError."""
    folder, name = os.path.split(os.fspath(path))
    os.makedirs(folder or ".", exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=folder or ".", prefix=f".{name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
        os.chmod(temporary, 0o644)  # mkstemp hides it from everybody else
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def load(path: str | os.PathLike[str]) -> ShardIndex:
    """The index in a side file; only its header is read. Raises Damaged, OSError, or DataError for a pipe."""
    files.refuse_special(path)
    with open(path, "rb") as file:
        head, length = file.read(4096), os.fstat(file.fileno()).st_size
        if head[:8] != _MAGIC or len(head) < 16:
            raise Damaged("it does not begin as an index of this version does")
        size, crc = struct.unpack("<II", head[8:16])
        if size > _LONGEST_HEADER:
            raise Damaged("its header is damaged")
        header = head[16 : 16 + size]
        header += file.read(size - len(header))
    if zlib.crc32(header) != crc:
        raise Damaged("its header is damaged")
    layout = json.loads(header)
    if length != 16 + size + layout["bytes"]:
        raise Damaged(f"it has {length} bytes instead of {16 + size + layout['bytes']}")
    facts = {name: tuple(v) if isinstance(v, list) else v for name, v in layout.pop("shard").items()}
    return ShardIndex(**facts, path=str(path), layout=layout | {"start": 16 + size})


class _Maps:
    """Side files mapped into memory: shared between processes by the page cache, a bounded number at a time."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, int], Samples] = {}
        self._lock = threading.Lock()

    def get(self, index: ShardIndex) -> Samples:
        name = (index.path, index.layout["crc"])
        found = self._open.get(name)
        if found is None:
            found = _map(index)
            with self._lock:
                while len(self._open) >= _MAPS:
                    self._open.pop(next(iter(self._open)))
                self._open[name] = found
        return found


_MAPPED = _Maps()


def _map(index: ShardIndex) -> Samples:
    layout = index.layout
    payload = memoryview(_contents(index))[layout["start"] :]
    if len(payload) != layout["bytes"] or zlib.crc32(payload) != layout["crc"]:
        raise Damaged("its contents are damaged")
    arrays = {
        name: np.frombuffer(payload, np.dtype(kind), count, at)
        for name, (kind, count, at) in layout["arrays"].items()
    }
    columns = {
        name.partition(":")[2]: arrays.pop(name) for name in list(arrays) if name.startswith("column:")
    }
    extensions = tuple(layout["extensions"])
    return Samples(**arrays, extensions=extensions, unit=layout["unit"], columns=columns, notes=index.notes)


def _contents(index: ShardIndex) -> mmap.mmap | bytes:
    """All bytes of the side file, mapped if it is in the cache.

    There files are only ever replaced as a whole. One that lies with the shards may be cut short in place by whoever
    copies another over it, and a process that then looks at its mapping is killed without a word.
    """
    path = index.path
    if index.snapshot:
        with open(path, "rb") as file:
            data = file.read()
        path = f"{index.snapshot}.{index.layout['crc']:08x}"
        if not os.path.exists(path) or os.path.getsize(path) != len(data):
            try:
                write_whole(path, data)
            except OSError:
                return data
    with open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise Damaged(f"{path} is empty") from error


def place_in_cache(shard: str, cache: str | os.PathLike[str]) -> pathlib.Path:
    """Where the index of a local shard stands that cannot have it beside itself."""
    digest = hashlib.sha256((shard if "://" in shard else os.path.abspath(shard)).encode()).hexdigest()[:16]
    name = shard.rstrip("/").rsplit("/", 1)[-1].split("?")[0]
    return pathlib.Path(cache) / "indexes" / f"{digest}-{name}{ENDING}"


def find(
    places: Sequence[str | os.PathLike[str]], fits: Callable[[ShardIndex], bool], shard: str | None = None
) -> ShardIndex | None:
    """The index in the first of some side files that belongs to the shard; a fuller later one is preferred.

    One that is damaged or belongs to another shard is passed over with a warning, and so is one that is older than
    the local file `shard`: captions corrected inside their blocks change nothing that `fits` looks at.
    """
    written = os.stat(shard).st_mtime_ns if shard else 0
    best = None
    for place in places:
        try:
            index = load(place)
        except FileNotFoundError:
            continue
        except (Damaged, OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s is not a usable index: %s; the shard is read anew", place, error)
            continue
        if not fits(index):
            _log.warning("%s does not belong to its shard, which has changed since; it is read anew", place)
        elif os.stat(place).st_mtime_ns < written:
            _log.warning("%s is older than its shard; it is read anew", place)
        elif best is None or len(index.columns) > len(best.columns):
            best = index
    return best


def open_index(
    shard: str, local: str, cache: str | os.PathLike[str], build: Callable[[str], Samples]
) -> ShardIndex:
    """The index of a shard: from the file beside it, else from the cache, else made now and kept in the cache.

    Args:
        shard: path or address as the user gave it.
        local: the file with its contents, uncompressed.
        cache: the cache folder.
        build: reads the samples of a local file.

    Raises:
        DataError: the shard cannot be read.
    """
    kept = place_in_cache(shard, cache)
    try:
        found = find([shard + ENDING, kept], lambda i: i.fits(local), shard)
    except OSError as error:
        raise DataError(f"cannot read {shard}: {error}") from error
    if found is None:
        return make(local, kept, build)
    return found if found.path == str(kept) else replace(found, snapshot=str(kept))


def make(local: str, place: str | os.PathLike[str], build: Callable[[str], Samples]) -> ShardIndex:
    """Read a shard's samples and keep them in the side file `place`; only in memory where that cannot be written.

    Raises:
        DataError: the shard cannot be read.
    """
    try:
        index = describe(local, build(local))
    except OSError as error:
        raise DataError(f"cannot read {local}: {error}") from error
    try:
        return save(index, place)
    except OSError as error:
        _log.warning("the index of %s is kept in memory only: cannot write %s (%s)", local, place, error)
        return index


def with_column(
    index: ShardIndex, samples: Samples, name: str, values: np.ndarray, spare: str | os.PathLike[str]
) -> ShardIndex:
    """The index with one more column (integers from 0), written over its side file, else to `spare`.

    Raises:
        DataError: another number of values than samples.
    """
    if len(values) != index.count:
        raise DataError(f"column {name!r} has {len(values)} values for {index.count} samples")
    columns = samples.columns | {name: narrow(np.asarray(values).astype(np.uint64), np.uint16)}
    fuller = replace(index, columns=tuple(columns), kept=samples._replace(columns=columns))
    for place in (index.path, spare):
        with contextlib.suppress(OSError):
            if place:
                return replace(save(fuller, place), snapshot=index.snapshot if place == index.path else "")
    _log.warning("column %r of %s is kept in memory only: its side file cannot be written", name, index.path)
    return fuller
