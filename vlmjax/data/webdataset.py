"""Webdataset shards: tar files read at random through an index of offsets, without unpacking them."""

import hashlib
import json
import logging
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from vlmjax.data import files
from vlmjax.data.record import Record
from vlmjax.errors import BadRecord, DataError

IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg jpe jfif png webp gif bmp tif tiff avif jp2 j2k ppm pgm pnm pbm".split()
)
TEXT_EXTENSIONS = ("txt", "caption", "text")
CAPTION_FIELDS = ("caption", "captions", "text", "sentence", "sentences")

_BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_READ_AHEAD = 1 << 16
_log = logging.getLogger(__name__)


class Member(NamedTuple):
    """One file inside a tar: its name, where its bytes begin and how many there are."""

    name: str
    offset: int
    size: int


class _Window:
    """Sequential header reads through one buffer: a system call per 64 KB where members are small."""

    def __init__(self, descriptor: int):
        self.descriptor, self.start, self.data = descriptor, 0, b""

    def read(self, offset: int, size: int) -> bytes:
        begin = offset - self.start
        if begin < 0 or begin + size > len(self.data):
            self.start, self.data = offset, os.pread(self.descriptor, max(size, _READ_AHEAD), offset)
            begin = 0
        return self.data[begin : begin + size]


def members(path: str) -> Iterator[Member]:
    """The regular files of a tar in order: ustar, GNU long names and big sizes, pax names and sizes.

    Links, folders and devices are passed over; nothing is ever unpacked to a path. A tar that stops in the
    middle or is damaged gives the members before the damage and a warning in the log.

    Raises:
        DataError: the file does not begin with a tar header.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield from _members(path, _Window(descriptor), os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _members(path: str, window: _Window, length: int) -> Iterator[Member]:
    position, found, ended, long_name, pax = 0, 0, False, None, {}
    while position + _BLOCK <= length:
        header = window.read(position, _BLOCK)
        if not header.strip(b"\0"):  # the mark of the end, or padding between concatenated tars
            position, ended = position + _BLOCK, True
            continue
        if not _checksum_is_right(header):
            if position == 0:
                raise DataError(f"{path} is not a tar file (its first header does not add up)")
            _log.warning("%s: damaged at byte %d; using the %d files before it", path, position, found)
            return
        kind, size = header[156:157], _number(header[124:136])
        start = position + _BLOCK
        if kind == b"L":
            long_name = window.read(start, size).rstrip(b"\0").decode("utf-8", "replace")
        elif kind == b"x":
            pax = _pax(path, window.read(start, size))
        elif kind != b"g":
            size = int(pax.get("size", size))
            if kind in _REGULAR:
                found += 1
                yield Member(pax.get("path") or long_name or _ustar_name(header), start, size)
            long_name, pax = None, {}
        position = start + -(-size // _BLOCK) * _BLOCK
    if not ended:
        _log.warning("%s: cut off at byte %d: it has no end mark; %d files found", path, length, found)


def _checksum_is_right(header: bytes) -> bool:
    try:
        expected = int(header[148:156].split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return False
    return sum(header) - sum(header[148:156]) + 8 * 32 == expected


def _number(field: bytes) -> int:
    """Octal, or base 256 when the top bit is set (GNU, for sizes from 8 GiB)."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _pax(path: str, data: bytes) -> dict[str, str]:
    """Records '<length> <key>=<value>\\n' of a pax header; the length counts itself."""
    out, position = {}, 0
    while position < len(data) and data[position : position + 1].isdigit():
        number, found, _ = data[position : position + 20].partition(b" ")
        if not found or not number.isdigit() or not len(number) < int(number) <= len(data) - position:
            _log.warning("%s: damaged pax header %r passed over", path, data[:40])
            return {}
        space, end = position + len(number), position + int(number)
        key, _, value = data[space + 1 : end - 1].partition(b"=")
        out[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        position = end
    return out


def _ustar_name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "replace")


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member: the key ends at the first dot of the base name; None for hidden files.

    'train/0001.seg.png' -> ('train/0001', 'seg.png'). This is webdataset's own rule.
    """
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or not extension or base.startswith("__"):
        return None
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


class Samples(NamedTuple):
    """The index of one shard in flat arrays, small enough to keep for millions of samples.

    Sample i has key `keys[key_at[i]:key_at[i+1]]` and the members `first[i]:first[i+1]`; member j holds
    `size[j]` bytes at `offset[j]`, its extension is `extensions[extension[j]]`.
    """

    keys: bytes
    key_at: np.ndarray
    first: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    extension: np.ndarray
    extensions: tuple[str, ...]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.first) - 1

    def key(self, i: int) -> str:
        """The key of sample i."""
        return self.keys[self.key_at[i] : self.key_at[i + 1]].decode()

    def parts(self, i: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size) of sample i, in tar order."""
        places = range(self.first[i], self.first[i + 1])
        return {self.extensions[self.extension[j]]: (int(self.offset[j]), int(self.size[j])) for j in places}


def index(path: str) -> Samples:
    """Read the headers of a tar and group its members by key, wherever in the tar they stand.

    A second member with the same key and extension begins a new sample of that key.
    """
    groups: list[tuple[str, list[tuple[str, int, int]]]] = []
    latest: dict[str, int] = {}
    for name, offset, size in members(path):
        parts = split_name(name)
        if parts is None:
            continue
        key, extension = parts
        at = latest.get(key)
        if at is None or any(extension == other for other, _, _ in groups[at][1]):
            at = latest[key] = len(groups)
            groups.append((key, []))
        groups[at][1].append((extension, offset, size))
    return _flatten(groups)


def _flatten(groups: list[tuple[str, list[tuple[str, int, int]]]]) -> Samples:
    codes: dict[str, int] = {}
    key_at, first, offsets, sizes, kinds = (
        array("q", [0]),
        array("q", [0]),
        array("q"),
        array("q"),
        array("l"),
    )
    for key, parts in groups:
        key_at.append(key_at[-1] + len(key.encode()))
        first.append(first[-1] + len(parts))
        for extension, offset, size in parts:
            offsets.append(offset)
            sizes.append(size)
            kinds.append(codes.setdefault(extension, len(codes)))
    return Samples(
        "".join(key for key, _ in groups).encode(),
        np.array(key_at, np.uint32),
        np.array(first, np.uint32),
        np.array(offsets, np.int64),
        np.array(sizes, np.int64),
        np.array(kinds, np.uint16),
        tuple(codes),
    )


class LazyMembers(dict):
    """Extension -> contents of the other members of a sample, read from the shard when asked for."""

    def __init__(self, parts: dict[str, tuple[int, int]], read: Callable[[int, int], bytes]):
        """`parts` maps an extension to (offset, size); `read` fetches them."""
        super().__init__(parts)
        self._read = read

    def __getitem__(self, extension: str) -> bytes:
        """The bytes of the member with this extension."""
        return self._read(*super().__getitem__(extension))

    def get(self, extension: str, default: Any = None) -> Any:
        """The bytes of the member, or `default` when the sample has none such."""
        return self[extension] if extension in self else default

    def values(self) -> Any:
        """The bytes of every member."""
        return [self[extension] for extension in self]

    def items(self) -> Any:
        """Pairs of extension and bytes."""
        return [(extension, self[extension]) for extension in self]


def image_extension(extensions: Sequence[str]) -> str | None:
    """Which member is the image: a plain image extension first ('jpg'), else one ending so ('input.png')."""
    plain = [e for e in extensions if e in IMAGE_EXTENSIONS]
    ending = [e for e in extensions if e.rpartition(".")[2] in IMAGE_EXTENSIONS]
    return (plain or ending or [None])[0]


def captions_of(value: Any) -> list[str]:
    """Every caption in a decoded json value: text, a list of texts, or an object with a caption field."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in captions_of(item)]
    if isinstance(value, dict):
        return [text for name in CAPTION_FIELDS if name in value for text in captions_of(value[name])]
    return []


def tidy(captions: Sequence[str]) -> tuple[str, ...]:
    """Captions stripped, without empty ones and repetitions, in order; half of a surrogate pair becomes "?"."""
    whole = (text.encode("utf-8", "replace").decode("utf-8") for text in captions)
    stripped = (re.sub(r"\s+", " ", text).strip() for text in whole)
    return tuple(dict.fromkeys(text for text in stripped if text))


class TarSource:
    """Image-text pairs in tar shards, any of them at any time: `source[i] -> Record`.

    A sample's image is its member with an image extension, its captions are its `.txt` member and the caption
    fields of its `.json`; all other members are in `record.extra`, read when looked up.
    """

    def __init__(self, paths: Sequence[str], *, name: str = "", cache: str | None = None):
        """Index the shards (gzipped and remote ones through the cache).

        Raises:
            DataError: a shard that cannot be read or is no tar, or shards without any sample.
        """
        self.paths = list(paths)
        with ThreadPoolExecutor(min(8, len(self.paths) or 1)) as pool:
            self._local = list(pool.map(lambda path: files.localize(path, cache), self.paths))
            self._shards = list(pool.map(index, self._local))
        self.name = name or self.paths[0]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        if not len(self):
            raise DataError(
                f"{self.name}: {len(self.paths)} tar file(s) hold no sample (files named key.jpg, key.txt)"
            )

    @property
    def fingerprint(self) -> str:
        """Changes when shards, their order or their contents' layout change; not when they are moved."""
        digest = hashlib.sha256()
        for path, shard in zip(self.paths, self._shards, strict=True):
            digest.update(f"{os.path.basename(path)}|{len(shard)}|{int(shard.size.sum())}".encode())
            digest.update(shard.keys)
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        """Number of samples in all shards."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def _place(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name}: no sample {i}, there are {len(self)}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return shard, i - (int(self._ends[shard - 1]) if shard else 0)

    def key(self, i: int) -> str:
        """The key of sample i, without reading it."""
        shard, at = self._place(i)
        return self._shards[shard].key(at)

    def __getitem__(self, i: int) -> Record:
        """Sample i. Raises BadRecord when it has no image or its bytes cannot be read."""
        shard, at = self._place(i)
        key, parts = self._shards[shard].key(at), self._shards[shard].parts(at)

        def read(offset: int, size: int) -> bytes:
            return self._read(shard, key, offset, size)

        extension = image_extension(list(parts))
        if extension is None:
            raise BadRecord("no_image", key, f"members {', '.join(parts)}")
        captions = []
        for kind in TEXT_EXTENSIONS:
            if kind in parts:
                captions.append(read(*parts[kind]).decode("utf-8", "replace"))
        if "json" in parts:
            captions += captions_of(_json(read(*parts["json"]), key))
        used = {extension, *TEXT_EXTENSIONS}
        rest = LazyMembers({name: where for name, where in parts.items() if name not in used}, read)
        return Record(key, read(*parts[extension]), tidy(captions), rest)

    def _read(self, shard: int, key: str, offset: int, size: int) -> bytes:
        try:
            data = files.READER.read(self._local[shard], offset, size)
        except OSError as error:
            raise BadRecord("unreadable_shard", key, f"{self.paths[shard]}: {error}") from error
        if len(data) != size:
            raise BadRecord("truncated_shard", key, f"{self.paths[shard]}: {len(data)} of {size} bytes")
        return data


def _json(data: bytes, key: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise BadRecord("bad_json", key, str(error)) from error
