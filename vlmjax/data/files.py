"""Files as sources see them: patterns to paths, a local cache for remote and gzipped ones, shared reads."""

import contextlib
import difflib
import glob
import gzip
import hashlib
import os
import pathlib
import re
import shutil
import tempfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

from vlmjax.errors import DataError

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_REMOTE = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")
_OPEN_FILES = 256  # well under the usual limit of 1,024 per process


def is_remote(path: str) -> bool:
    """True for `scheme://...` paths (gs, s3, https, hf, memory, ...)."""
    return bool(_REMOTE.match(path)) and not path.startswith("file://")


def cache_folder(folder: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Where unpacked and downloaded shards live: the argument, else $VLMJAX_CACHE, else ~/.cache/vlmjax."""
    chosen = folder or os.environ.get("VLMJAX_CACHE") or os.path.join("~", ".cache", "vlmjax")
    return pathlib.Path(os.path.expanduser(chosen))


def expand_braces(pattern: str) -> list[str]:
    """`{00000..00012}` and `{a,b}` written out, in order, width kept: 'x-{08..10}' -> x-08, x-09, x-10."""
    match = _BRACES.search(pattern)
    if not match:
        return [pattern]
    first, last, choices = match.groups()
    if choices is not None:
        middles = choices.split(",")
    else:
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        step = 1 if int(last) >= int(first) else -1
        middles = [str(i).zfill(width) for i in range(int(first), int(last) + step, step)]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [path for middle in middles for path in expand_braces(head + middle + tail)]


def find(pattern: str) -> list[str]:
    """The paths a pattern stands for: braces written out in order, globs sorted, remote paths as they are.

    Raises:
        DataError: a path does not exist or a glob matches nothing; names what lies nearby.
    """
    paths = [path for part in expand_braces(pattern) for path in _match(part, pattern)]
    missing = [path for path in paths if not is_remote(path) and not os.path.exists(path)]
    if missing:
        more = f" (and {len(missing) - 1} more of its {len(paths)} files)" if len(missing) > 1 else ""
        raise DataError(f"no such data file: {missing[0]}{more}, from {pattern!r}; {_nearby(missing[0])}")
    return paths


def _match(path: str, pattern: str) -> list[str]:
    path = path.removeprefix("file://")
    if not is_remote(path):
        path = os.path.expanduser(path)
        if os.path.exists(path) or not glob.has_magic(path):
            return [path]
        found = sorted(glob.glob(path, recursive=True))
    elif glob.has_magic(path.split("?")[0]):
        filesystem, inner = _filesystem(path)
        found = [filesystem.unstrip_protocol(name) for name in sorted(filesystem.glob(inner))]
    else:
        return [path]
    if not found:
        raise DataError(f"nothing matches {pattern!r}; {_nearby(path)}")
    return found


def _nearby(path: str) -> str:
    """What exists around a path that does not, for an error message."""
    if is_remote(path):
        return "check the bucket and the credentials"
    folder = os.path.dirname(path) or "."
    while glob.has_magic(folder):
        folder = os.path.dirname(folder) or "."
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    names = sorted(os.listdir(folder))
    if not names:
        return f"{folder} is empty"
    best = difflib.get_close_matches(os.path.basename(path), names, n=3, cutoff=0.5) or names[:3]
    return f"{folder} holds {len(names)} entries, such as {', '.join(best)}"


def localize(path: str, cache: str | os.PathLike[str] | None = None) -> str:
    """A local, uncompressed, seekable file with the contents of `path`.

    Remote files are downloaded whole and gzipped ones unpacked, once, into the cache. The copy is named after
    path, size and time of change, so a changed shard gets a new copy, and it appears under that name only
    when complete, so a killed process leaves no half file that another would read.

    Raises:
        DataError: unreachable, damaged gzip, or no room in the cache.
    """
    if is_remote(path):
        path = _download(path, cache)
    if not path.endswith((".gz", ".tgz")):
        return path
    path = os.path.abspath(path)
    stat = os.stat(path)
    target = _cache_name(path, f"{stat.st_size}|{stat.st_mtime_ns}", cache)
    return _fill(target, path, lambda: gzip.open(path, "rb"))


def _download(url: str, cache: str | os.PathLike[str] | None) -> str:
    filesystem, inner = _filesystem(url)
    try:
        info = filesystem.info(inner)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"cannot reach {url}: {error}") from error
    version = "|".join(str(info.get(name)) for name in ("size", "mtime", "ETag", "etag", "md5Hash"))
    return _fill(_cache_name(url, version, cache), url, lambda: filesystem.open(inner, "rb"))


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        scheme = url.split("://")[0]
        raise DataError(
            f"cannot read {url}: install fsspec and its driver for {scheme}:// ({error})"
        ) from error


def _cache_name(path: str, version: str, cache: str | os.PathLike[str] | None) -> pathlib.Path:
    digest = hashlib.sha256(f"{path}|{version}".encode()).hexdigest()[:16]
    name = path.rstrip("/").rsplit("/", 1)[-1].split("?")[0]
    if not is_remote(path):
        name = name.removesuffix(".gz").replace(".tgz", ".tar")
    return cache_folder(cache) / "shards" / f"{digest}-{name}"


def _fill(target: pathlib.Path, name: str, opener: Callable[[], Any]) -> str:
    """Copy a stream to `target` unless it is there; rename last, so that the name means complete."""
    if target.exists():
        return str(target)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name + ".", suffix=".part")
        with os.fdopen(descriptor, "wb") as out, opener() as stream:
            _copy(stream, out)
        os.replace(temporary, target)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot bring {name} into the cache {target.parent}: {error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    return str(target)


def _copy(stream: Any, out: IO[bytes]) -> None:
    shutil.copyfileobj(stream, out, 1 << 20)
    out.flush()


class _Descriptor:
    """An open file that closes itself when the last reader lets go of it, which may be after its eviction."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "number"):
            close(self.number)


class Reader:
    """Positioned reads from many files by many threads, with a bounded number of files open."""

    def __init__(self, limit: int = _OPEN_FILES):
        """`limit` files stay open; the one unused longest is closed first."""
        self._limit, self._lock = limit, threading.Lock()
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer only where the file ends. Raises OSError."""
        with self._lock:
            handle = self._open.get(path)
            if handle is None:
                handle = self._open[path] = _Descriptor(path)
                if len(self._open) > self._limit:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(path)
        return os.pread(handle.number, size, offset)

    def __getstate__(self) -> dict[str, int]:
        """Worker processes open files of their own."""
        return {"limit": self._limit}

    def __setstate__(self, state: dict[str, int]) -> None:
        """Start with nothing open."""
        self.__init__(state["limit"])


READER = Reader()
