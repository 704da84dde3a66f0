"""Width and height of an encoded image from its header, as it stands upright, without decoding it."""

import io
import struct

from vlmjax.data.pictures import jpeg
from vlmjax.data.pictures.jpeg import Read
from vlmjax.data.pictures.signatures import format_of

_HEAD = 64  # bytes that hold the size in every format but JPEG
_CHUNKS = 200  # of a PNG before its pixels
_WEBP_EXIF = 0x08


def size(data: bytes | Read) -> tuple[int, int] | None:
    """(width, height) in pixels after EXIF orientation, None where the header does not tell.

    Args:
        data: the file, or `read(offset, count) -> bytes` (fewer where it ends), so that only headers are read.
    """
    read = data if callable(data) else lambda at, count: data[at : at + count]
    try:
        found = _size(read)
    except (struct.error, IndexError, ValueError):
        return None
    return found if found and min(found) > 0 else None


def _size(read: Read) -> tuple[int, int] | None:
    head = read(0, _HEAD)
    kind = format_of(head)
    if kind == "jpeg":
        return _jpeg(read)
    if kind == "png":
        return _png(read, struct.unpack(">II", head[16:24]))
    if kind == "gif":
        return struct.unpack("<HH", head[6:10])
    if kind == "webp":
        return _with_pillow(read) if head[12:16] == b"VP8X" and head[20] & _WEBP_EXIF else _webp(head)
    if kind == "bmp" and head[14:18] == b"\x28\0\0\0":
        width, height = struct.unpack("<ii", head[18:26])
        return width, abs(height)
    return _with_pillow(read)


def _jpeg(read: Read) -> tuple[int, int] | None:
    """From the frame header; on the way note EXIF's orientation."""
    turned = False
    for kind, at, length in jpeg.segments(read):
        if kind in jpeg.FRAMES:
            height, width = struct.unpack(">HH", read(at + 1, 4))
            return (height, width) if turned else (width, height)
        if kind == jpeg.APP1 and read(at, 6) == b"Exif\0\0":
            turned = _orientation(read(at + 6, length - 6)) >= 5
    return None


def _png(read: Read, shape: tuple[int, int]) -> tuple[int, int]:
    """Turned when an eXIf chunk before the pixels says so."""
    at = 8
    for _ in range(_CHUNKS):
        length, kind = struct.unpack(">I4s", read(at, 8))
        if kind == b"eXIf":
            return shape[::-1] if _orientation(read(at + 8, length)) >= 5 else shape
        if kind == b"IDAT":
            break
        at += 12 + length
    return shape


def _orientation(tiff: bytes) -> int:
    """The orientation tag (0x0112) of EXIF's first directory, 1 without."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    start = struct.unpack(order + "I", tiff[4:8])[0]
    entries = tiff[start : start + 2]
    for i in range(struct.unpack(order + "H", entries)[0] if len(entries) == 2 else 0):
        entry = tiff[start + 2 + 12 * i : start + 14 + 12 * i]
        if len(entry) == 12 and struct.unpack(order + "H", entry[:2])[0] == 0x0112:
            value = struct.unpack(order + "H", entry[8:10])[0]
            return value if 1 <= value <= 8 else 1
    return 1


def _webp(head: bytes) -> tuple[int, int] | None:
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = struct.unpack("<I", head[21:25])[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", head[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


def _with_pillow(read: Read) -> tuple[int, int] | None:
    """Rarer formats (TIFF, AVIF, JPEG 2000, PNM): Pillow reads their headers."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read(0, 1 << 62))) as image:
            # Pillow turns a TIFF by itself, and gives its size accordingly.
            turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except Exception:  # whatever Pillow says here, decoding will say again and be counted
        return None
