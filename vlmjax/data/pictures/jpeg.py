"""The segments of a JPEG file (ITU-T T.81, B.1 and B.2), walked without decoding it."""

import re
from collections.abc import Callable, Iterator

Read = Callable[[int, int], bytes]

FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame, of any process
APP1, SCAN, END = 0xE1, 0xDA, 0xD9
_MOST = 200  # segments before a scan
_SEQUENTIAL = (0xC0, 0xC1)
_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")  # among coded pixels: no stuffed byte, no restart, no fill


def segments(read: Read, at: int = 2) -> Iterator[tuple[int, int, int]]:
    """(marker, offset of its contents, their length) of the segments from `at` on, to the first scan or the end.

    `read(offset, count)` gives bytes, fewer where the file ends. What cannot be understood ends the walk.
    """
    for _ in range(_MOST):
        head = read(at, 4)
        if len(head) < 4 or head[0] != 0xFF or head[1] == END:
            return
        kind = head[1]
        if kind == 0xFF or kind == 0x01 or 0xD0 <= kind <= 0xD8:  # fill byte, or a marker without contents
            at += 1 if kind == 0xFF else 2
            continue
        length = int.from_bytes(head[2:])
        yield kind, at + 4, length - 2
        if kind == SCAN:
            return
        at += 2 + length


def plain_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of an 8-bit grey or three-colour JPEG that is stored upright, or None: let Pillow look.

    Pillow's own reading of a header takes five times as long, under the interpreter's lock.
    """
    if data[:2] != b"\xff\xd8":
        return None
    size = None
    for kind, at, length in segments(lambda start, count: data[start : start + count]):
        if kind == SCAN:
            return size
        if kind in FRAMES:
            frame = data[at : at + 6]  # bits, height, width, components
            if (
                size
                or kind not in (*_SEQUENTIAL, 0xC2)
                or len(frame) < 6
                or frame[0] != 8
                or frame[5] not in (1, 3)
            ):
                return None
            size = int.from_bytes(frame[3:5]), int.from_bytes(frame[1:3])
            if not all(size):
                return None
        elif kind == APP1 and _may_be_turned(data[at : at + length]):
            return None
    return None


def _may_be_turned(segment: bytes) -> bool:
    """True unless neither EXIF's number of the orientation tag nor XMP's name of it is anywhere in it."""
    return b"\x01\x12" in segment or b"\x12\x01" in segment or b"Orientation" in segment


def scans(data: bytes, most: int) -> int:
    """How many scans a decoder goes through, at most one more than `most`.

    What lies behind the picture's end, such as a video, is not looked at.
    """
    count, at, parts, sequential = 0, 2, b"", False
    while count <= most:
        for kind, place, length in segments(lambda start, size: data[start : start + size], at):
            at = place + length
            if kind in FRAMES:
                sequential, parts = kind in _SEQUENTIAL, data[place + 5 : place + 6]
            if kind == SCAN:
                break
        else:
            break
        count += 1
        if sequential and data[place : place + 1] == parts:  # all components: decoders stop after it
            break
        following = _MARKER.search(data, at)
        if following is None:
            break
        at = following.start()
    return count
