"""Files in buckets and on web servers: what they are, and their bytes, with retries and checks."""

import base64
import binascii
import contextlib
import gzip
import http.client
import logging
import random
import shutil
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, TypeVar

from vlmjax.data.storage.checked import Checked, Info, s3_etag
from vlmjax.errors import DataError

ATTEMPTS = 5
FIRST_WAIT = 0.5  # seconds; doubled after each attempt
TIMEOUT = 60.0  # seconds without a byte from a web server
_THREADS = 16
# What trying again does not mend. The rest of OSError, and whatever drivers raise of their own, may be the network.
_FINAL = (
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ImportError,
    TypeError,
    DataError,
)
_OTHER_ETAGS: set[str] = set()  # buckets whose ETags are no MD5
_log = logging.getLogger(__name__)
T = TypeVar("T")


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of an address and the path in it.

    Raises:
        DataError: no driver for it.
    """
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        scheme = url.split("://")[0]
        raise DataError(
            f"cannot read {url}: install fsspec and its driver for {scheme}:// ({error})"
        ) from error


def glob(url: str) -> list[str]:
    """Addresses that match a pattern, sorted. Raises DataError."""
    if _is_web(url):
        raise DataError(
            f"{url}: a web server cannot be asked what it has; write the names out, as in {{000..012}}"
        )
    system, inner = filesystem(url)
    found = retrying(f"list {url}", lambda: system.glob(inner))
    return [system.unstrip_protocol(name) for name in sorted(found)]


def infos(urls: Sequence[str]) -> list[Info | None]:
    """What each file is, None for those that are not there.

    Many files of one folder cost one listing instead of a request each.

    Raises:
        DataError: unreachable, or no driver.
    """
    known: dict[str, Info] = {}
    folders: dict[str, list[str]] = {}
    for url in urls:
        folders.setdefault(url.rpartition("/")[0], []).append(url)
    for folder, inside in folders.items():
        if len(inside) >= _THREADS and not _is_web(folder):
            system, path = filesystem(folder)
            with contextlib.suppress(FileNotFoundError):
                listed = retrying(f"list {folder}", lambda s=system, p=path: s.ls(p, detail=True))
                known |= {f"{folder}/{e['name'].rpartition('/')[2]}": _info(e) for e in listed}
    left = [url for url in urls if url not in known]
    with ThreadPoolExecutor(_THREADS) as pool:
        known |= {url: it for url, it in zip(left, pool.map(info, left), strict=True) if it is not None}
    return [known.get(url) for url in urls]


def info(url: str) -> Info | None:
    """What one file is, None when it is not there. Raises DataError."""
    try:
        if _is_web(url):
            return retrying(f"reach {url}", lambda: _web_info(url))
        system, inner = filesystem(url)
        return _info(retrying(f"reach {url}", lambda: system.info(inner)))
    except FileNotFoundError:
        return None


def _info(entry: dict[str, Any]) -> Info:
    named = (
        "mtime",
        "updated",
        "created",
        "LastModified",
        "ETag",
        "etag",
        "md5Hash",
        "generation",
        "blob_id",
    )
    # Times come as numbers or as datetimes, depending on how the entry was asked for; only one of both is a version.
    version = "|".join(str(entry.get(n)) for n in named if n in entry and n not in ("created",))
    size = entry.get("size")
    return Info(
        None if size is None else int(size),
        f"{size}|{version}",
        _md5(entry.get("md5Hash") or entry.get("md5")),
        s3_etag(entry.get("ETag")),
    )


def _md5(value: Any) -> str:
    """An MD5 as hex, from hex or base64; "" for anything else."""
    if not isinstance(value, str):
        return ""
    with contextlib.suppress(binascii.Error, ValueError):
        raw = bytes.fromhex(value) if len(value) == 32 else base64.b64decode(value, validate=True)
        return raw.hex() if len(raw) == 16 else ""
    return ""


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _request(url: str, method: str = "GET", **more: str) -> Any:
    """An answer of a web server. Needs no driver, and a silent server cannot hold it for longer than TIMEOUT."""
    headers = {"User-Agent": "vlmjax", "Accept-Encoding": "identity", **more}
    try:
        return urllib.request.urlopen(
            urllib.request.Request(url, headers=headers, method=method), timeout=TIMEOUT
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise FileNotFoundError(f"{url}: the server has no such file ({error.code})") from error
        if 400 <= error.code < 500 and error.code not in (408, 425, 429):
            raise PermissionError(f"{url}: the server refuses ({error.code} {error.reason})") from error
        raise


def _web_info(url: str) -> Info:
    try:
        answer = _request(url, "HEAD")
    except PermissionError:  # addresses signed for reading alone
        answer = _request(url)
    with answer:
        head = answer.headers
    length = head.get("Content-Length")
    hashes = dict(
        part.strip().split("=", 1) for part in head.get("x-goog-hash", "").split(",") if "=" in part
    )
    version = "|".join(str(head.get(name)) for name in ("Content-Length", "ETag", "Last-Modified"))
    etag = s3_etag(head.get("ETag")) if head.get("Server") == "AmazonS3" else ""
    md5 = _md5(hashes.get("md5") or head.get("Content-MD5"))
    return Info(int(length) if length else None, version, md5, etag)


def retrying(what: str, attempt: Callable[[], T]) -> T:
    """The result of `attempt`, tried again with growing waits where the network may be to blame.

    Raises:
        DataError: it failed every time.
        FileNotFoundError: there is no such file.
    """
    for count in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except FileNotFoundError:
            raise
        except _FINAL as error:
            raise DataError(f"cannot {what}: {error}") from error
        except Exception as error:  # drivers raise errors of their own for a lost connection
            told = f"{type(error).__name__}: {error}"
            if _is_local(error) or count == ATTEMPTS:
                raise DataError(f"cannot {what}: {told}") from error
            wait = (
                FIRST_WAIT * 2 ** (count - 1) * random.uniform(0.75, 1.25)
            )  # so that hosts do not come at once
            _log.warning("cannot %s (%s); attempt %d of %d in %.1f s", what, told, count + 1, ATTEMPTS, wait)
            time.sleep(wait)
    raise AssertionError("the loop above returns or raises")


def _is_local(error: Exception) -> bool:
    """A full disk, a damaged gzip, a file too large: not the network."""
    import errno

    return isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile, MemoryError)) or getattr(
        error, "errno", None
    ) in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
    )


def open_stream(url: str) -> Any:
    """The bytes of a file in order. Raises OSError, or an error of the driver's own."""
    if _is_web(url):
        return _request(url)
    system, inner = filesystem(url)
    return system.open(inner, "rb")


def download(url: str, about: Info, write: Callable[[Checked], None]) -> None:
    """Give the file's bytes to `write`, anew after each broken connection, and check that they were all.

    Raises:
        DataError: it cannot be had, is damaged, or cannot be written.
        FileNotFoundError: it is no longer there.
    """
    before: list[str] = []

    def attempt() -> None:
        with open_stream(url) as stream:
            checked = Checked(stream, url, about)
            try:
                write(checked)
                checked.check()
            except http.client.IncompleteRead as error:
                raise ConnectionError(f"{url}: the connection broke off") from error
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                checked.check()  # a gzip that ends too soon because the connection did is worth another attempt
                raise error
        _check_etag(url, about, checked.etags, before)

    retrying(f"download {url}", attempt)


def _check_etag(url: str, about: Info, found: list[str], before: list[str]) -> None:
    """Raise ConnectionError where the bytes do not give S3's ETag, unless the same ones came `before`.

    A connection does not damage them twice alike: then the ETags of this bucket are something else, as where it
    encrypts with keys of its own, and are not looked at again.
    """
    bucket = url.split("/", 3)[2]
    if about.md5 or not found or about.etag in found or bucket in _OTHER_ETAGS:
        return
    if found != before:
        before[:] = found
        raise ConnectionError(f"{url}: its bytes do not give its ETag {about.etag}")
    _OTHER_ETAGS.add(bucket)
    _log.warning("the ETags of %s are no checksums of its files; their lengths alone are checked", bucket)


def small(url: str) -> bytes | None:
    """A whole small file, None when it is not there. Raises DataError."""
    about, data = info(url), []
    if about is None:
        return None
    try:
        download(url, about, lambda stream: data.append(stream.read()))
    except FileNotFoundError:
        return None
    return data[-1]


def end_of(url: str, size: int, count: int) -> bytes:
    """The last bytes of a file of `size` bytes; none where they cannot be had alone."""
    try:
        if not _is_web(url):
            system, inner = filesystem(url)
            return system.cat_file(inner, start=max(0, size - count), end=size)
        with _request(url, Range=f"bytes=-{count}") as answer:
            return answer.read(count) if answer.status == http.client.PARTIAL_CONTENT else b""
    except Exception as error:  # drivers raise errors of their own; whoever reads the file meets it again
        _log.debug("the end of %s: %s", url, error)
        return b""


def copy(stream: Any, out: IO[bytes]) -> None:
    """All bytes of a stream into a file, in pieces."""
    shutil.copyfileobj(stream, out, 1 << 20)
