"""What comes over the network, checked as it is read: its length, its checksum, and that it keeps coming."""

import hashlib
import re
import time
from typing import Any, NamedTuple

WINDOW = 60.0  # seconds of waiting over which the pace is judged
SLOWEST = 10_000  # bytes per second
_ETAG = re.compile(r"[0-9a-f]{32}(?:-\d+)?")
# Sizes of the parts that clients send files to S3 in: 8 MiB the AWS command line's and boto3's, 50 s3fs's, ...
_PARTS = tuple(n << 20 for n in (5, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 256, 512))


class Info(NamedTuple):
    """A remote file: bytes (None where unknown), a text that changes with its contents, its MD5 in hex or "".

    `etag` is S3's: the MD5 of the file, or "MD5 of the MD5s of its parts-their number", or neither, where the bucket
    encrypts with keys of its own. "" for other stores.
    """

    size: int | None
    version: str
    md5: str
    etag: str = ""


def s3_etag(value: Any) -> str:
    """An ETag as S3 gives it, without its quotes; "" for anything else."""
    text = value.strip('"') if isinstance(value, str) else ""
    return text if _ETAG.fullmatch(text) else ""


class _Parts:
    """The ETag S3 gives to what is sent in parts of one size; the plain MD5 for None."""

    def __init__(self, size: int | None):
        self._size, self._left = size, size
        self._md5, self._done = _md5(), b""

    def update(self, data: bytes) -> None:
        view = memoryview(data)
        while self._size and len(view) >= self._left:
            self._md5.update(view[: self._left])
            view = view[self._left :]
            self._done, self._md5, self._left = self._done + self._md5.digest(), _md5(), self._size
        self._md5.update(view)
        self._left = self._left and self._left - len(view)

    def etag(self) -> str:
        if not self._size:
            return self._md5.hexdigest()
        done = self._done + (self._md5.digest() if self._left < self._size else b"")
        return f"{_md5(done).hexdigest()}-{len(done) // 16}"


def _md5(data: bytes = b"") -> Any:
    return hashlib.md5(data, usedforsecurity=False)


def _candidates(about: Info) -> list[_Parts]:
    """All that the file's ETag may be the ETag of; none where the size of its parts cannot be guessed."""
    if about.md5 or not about.etag:
        return [_Parts(None)] if about.md5 else []
    _, _, count = about.etag.partition("-")
    if not count:
        return [_Parts(None)]
    sizes = {min(part, about.size) for part in _PARTS if about.size and -(-about.size // part) == int(count)}
    return [_Parts(size) for size in sorted(sizes)]


class Checked:
    """A stream that counts and hashes what is read from it, to see at its end whether that was the file."""

    def __init__(self, stream: Any, url: str, about: Info):
        """`about` says how long the file is and, where known, its checksums."""
        self._read = getattr(
            stream, "read1", stream.read
        )  # what is there, without waiting for all that is asked for
        self._url, self._about, self._count = url, about, 0
        self._hashes = _candidates(about)
        self._waited, self._lately = 0.0, 0

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, fewer at the end, all for -1. Raises ConnectionError where they come too slowly."""
        pieces, left = [], size
        while left and (piece := self._some(left)):
            pieces.append(piece)
            left = -1 if size < 0 else left - len(piece)
        return b"".join(pieces)

    def _some(self, most: int) -> bytes:
        begin = time.monotonic()
        data = self._read(most)
        self._waited += time.monotonic() - begin
        self._lately += len(data)
        self._count += len(data)
        for one in self._hashes:
            one.update(data)
        if data and self._waited >= WINDOW:
            if self._lately < SLOWEST * self._waited:
                raise ConnectionError(f"{self._url}: only {self._lately} bytes in {self._waited:.0f} s")
            self._waited, self._lately = 0.0, 0
        return data

    def check(self) -> None:
        """Raise ConnectionError unless all of the file has been read, and nothing else; its ETag is not looked at."""
        while self.read(1 << 20):
            pass
        if self._about.size not in (None, self._count):
            raise ConnectionError(f"{self._url}: got {self._count} bytes of {self._about.size}")
        if self._about.md5 and self.etags != [self._about.md5]:
            raise ConnectionError(f"{self._url}: its MD5 is {self.etags[0]}, not {self._about.md5}")

    @property
    def etags(self) -> list[str]:
        """What the file's ETag may be, by its bytes; empty where that is not known."""
        return [one.etag() for one in self._hashes]
