"""Tar files without unpacking them: where each member's bytes lie, and the samples its members make."""

import logging
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vlmjax.data.formats.fields import IMAGE_EXTENSIONS, image_extension
from vlmjax.data.pictures import image_header
from vlmjax.data.storage.samples import Samples, flatten
from vlmjax.errors import DataError

_BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_READ_AHEAD = 1 << 14
_FEW = 16
_LARGEST = 1 << 62  # bytes of a member: what says more is damaged
_LONGEST_HEADER = 1 << 24  # of a long name or of a pax header
Found = tuple[str, str, int, int, tuple[int, int] | None]
_log = logging.getLogger(__name__)


class Member(NamedTuple):
    """One file inside a tar: its name, where its bytes begin and how many there are."""

    name: str
    offset: int
    size: int


class Window:
    """Reads of neighbouring places through one buffer: few system calls where members are small."""

    def __init__(self, descriptor: int):
        """Reads from an open file, which stays open."""
        self.descriptor, self.start, self.data = descriptor, 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer only where the file ends."""
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
        DataError: the file does not begin with a tar header, or cannot be read.
    """

    def warn(note: str) -> None:
        _log.warning("%s: %s", path, note)

    yield from _with_window(path, lambda window, length: _members(path, window, length, warn))


def _with_window(path: str, walk: Callable[[Window, int], Iterator]) -> Iterator:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield from walk(Window(descriptor), os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _members(path: str, window: Window, length: int, warn: Callable[[str], None]) -> Iterator[Member]:
    position, found, ended, long_name, pax = 0, 0, False, None, {}
    while position + _BLOCK <= length:
        header = window.read(position, _BLOCK)
        if not header[0] and not header.strip(
            b"\0"
        ):  # the mark of the end, or padding between concatenated tars
            position, ended = position + _BLOCK, True
            continue
        if not _checksum_is_right(header):
            if position == 0:
                raise DataError(f"{path} is not a tar file (its first header does not add up)")
            warn(f"damaged at byte {position}; using the {found} files before it")
            return
        kind, size = header[156:157], _number(header[124:136])
        if kind not in (b"L", b"x", b"g") and "size" in pax:
            size = _decimal(pax["size"])
        if size is None or (kind in (b"L", b"x") and size > _LONGEST_HEADER):
            if position == 0:
                raise DataError(f"{path} is not a tar file (its first header does not add up)")
            warn(f"damaged at byte {position} (a size that is none); using the {found} files before it")
            return
        start = position + _BLOCK
        if kind == b"L":
            long_name = window.read(start, size).rstrip(b"\0").decode("utf-8", "replace")
        elif kind == b"x":
            pax = _pax(window.read(start, size), warn)
        elif kind != b"g":
            if kind in _REGULAR:
                found += 1
                yield Member(pax.get("path") or long_name or _ustar_name(header), start, size)
            long_name, pax = None, {}
        position = start + -(-size // _BLOCK) * _BLOCK
    if not ended:
        warn(f"cut off at byte {length}: it has no end mark; {found} files found")


def _checksum_is_right(header: bytes) -> bool:
    try:
        expected = int(header[148:154], 8)
    except ValueError:
        try:
            expected = int(header[148:156].split(b"\0")[0].strip() or b"0", 8)
        except ValueError:
            return False
    return sum(header) - sum(header[148:156]) + 8 * 32 == expected


def _number(field: bytes) -> int | None:
    """Octal, or base 256 when the top bit is set (GNU, for sizes from 8 GiB); None for what is no size."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        return value if value < _LARGEST else None
    digits = field.split(b"\0")[0].strip() or b"0"
    return int(digits, 8) if not digits.strip(b"01234567") else None


def _decimal(text: str) -> int | None:
    """A size in a pax header; None for what is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def _pax(data: bytes, warn: Callable[[str], None]) -> dict[str, str]:
    """Records '<length> <key>=<value>\\n' of a pax header; the length counts itself."""
    out, position = {}, 0
    while position < len(data) and data[position : position + 1].isdigit():
        number, found, _ = data[position : position + 20].partition(b" ")
        if not found or not number.isdigit() or not len(number) < int(number) <= len(data) - position:
            warn(f"damaged pax header {data[:40]!r} passed over")
            return {}
        space, end = position + len(number), position + int(number)
        key, _, value = data[space + 1 : end - 1].partition(b"=")
        out[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        position = end
    return out


def _ustar_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":
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


def index(path: str) -> Samples:
    """Read the headers of a tar and group its members by key, wherever in the tar they stand.

    A second member with the same key and extension begins a new sample of that key. Width and height are read from
    the first bytes of each sample's image; what is wrong with the tar goes into the notes.

    Raises:
        DataError: no tar, or unreadable.
    """
    groups: list[tuple[str, list[tuple[str, int, int]]]] = []
    latest: dict[str, int] = {}
    shapes: dict[int, tuple[int, int]] = {}
    used: set[tuple[int, str]] = set()
    chosen: dict[int, str] = {}
    notes: list[str] = []

    def walk(window: Window, length: int) -> Iterator[Found]:
        for member in _members(path, window, length, notes.append):
            parts = split_name(member.name)
            if parts is not None:
                image = parts[1] in IMAGE_EXTENSIONS or image_extension([parts[1]])
                shape = (image_header.size(_reader(window, member)) or (0, 0)) if image else None
                yield *parts, member.offset, member.size, shape

    for key, extension, offset, size, shape in _with_window(path, walk):
        at = latest.get(key)
        if at is None or _has(groups[at][1], at, extension, used):
            at = latest[key] = len(groups)
            groups.append((key, []))
        groups[at][1].append((extension, offset, size))
        if shape is not None and _comes_first(extension, chosen.get(at)):
            chosen[at], shapes[at] = extension, shape
    return flatten(groups, shapes, notes=notes)


def _has(parts: list[tuple[str, int, int]], at: int, extension: str, used: set[tuple[int, str]]) -> bool:
    """True when group `at` has such a member. The first few are looked through, the rest are noted in `used`."""
    if any(extension == other for other, _, _ in parts[:_FEW]) or (at, extension) in used:
        return True
    if len(parts) >= _FEW:
        used.add((at, extension))
    return False


def _comes_first(extension: str, other: str | None) -> bool:
    """True when a later image is the sample's own rather than an earlier one, as `image_extension` has it."""
    return other is None or (extension in IMAGE_EXTENSIONS and other not in IMAGE_EXTENSIONS)


def _reader(window: Window, member: Member) -> Callable[[int, int], bytes]:
    def read(at: int, count: int) -> bytes:
        return window.read(member.offset + at, max(0, min(count, member.size - at)))

    return read
