"""Files as sources see them: patterns to paths, the folder of the cache, positioned reads shared by threads."""

import contextlib
import difflib
import glob
import logging
import os
import pathlib
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable

from vlmjax.data.storage import remote
from vlmjax.errors import DataError

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")
_REMOTE = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")
LOG = logging.getLogger(__name__)
_MOST_NAMES = 1_000_000  # from one pattern
_OPEN_FILES = 256  # well under the usual limit of 1,024 per process


def is_remote(path: str) -> bool:
    """True for `scheme://...` paths (gs, s3, https, hf, memory, ...)."""
    return bool(_REMOTE.match(path)) and not path.startswith("file://")


def cache_folder(folder: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Where unpacked and downloaded shards live: the argument, else $VLMJAX_CACHE, else ~/.cache/vlmjax."""
    chosen = folder or os.environ.get("VLMJAX_CACHE") or os.path.join("~", ".cache", "vlmjax")
    return pathlib.Path(os.path.expanduser(chosen))


def is_special(path: str) -> bool:
    """True for what exists but is neither a file nor a folder: pipes, devices, sockets. Raises OSError, ValueError."""
    mode = os.stat(path).st_mode
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def refuse_special(path: str | os.PathLike[str]) -> None:
    """Raise DataError for a pipe or a device: opening one may wait for ever. What is missing shows later."""
    path = os.fspath(path)
    with contextlib.suppress(OSError):
        if not is_remote(path) and is_special(path):
            raise DataError(f"{path} is a pipe or a device; expected a file: write it to one first")


def expand_braces(pattern: str) -> list[str]:
    """`{00000..00012}` and `{a,b}` written out, in order, width kept: 'x-{08..10}' -> x-08, x-09, x-10.

    Raises:
        DataError: more than a million names.
    """
    match = _BRACES.search(pattern)
    if not match:
        return [pattern]
    first, last, choices = match.groups()
    if choices is not None:
        middles = choices.split(",")
    else:
        if max(len(first), len(last)) > 18 or abs(int(last) - int(first)) >= _MOST_NAMES:
            raise _too_many(match[0])
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        step = 1 if int(last) >= int(first) else -1
        middles = [str(i).zfill(width) for i in range(int(first), int(last) + step, step)]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    if "{" not in head + tail:
        return [head + middle + tail for middle in middles]
    out: list[str] = []
    for middle in middles:
        out += expand_braces(head + middle + tail)
        if len(out) > _MOST_NAMES:
            raise _too_many(pattern)
    return out


def _too_many(pattern: str) -> DataError:
    return DataError(f"{pattern[:80]!r} stands for more than {_MOST_NAMES:,} files: check its range")


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
        found = remote.glob(path)
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


class _Descriptor:
    """An open file that closes itself when the last reader lets go of it, which may be after its eviction."""

    def __init__(self, path: str):
        self.number, self.used = os.open(path, os.O_RDONLY), False

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "number"):
            close(self.number)


class Reader:
    """Positioned reads from many files by many threads, with a bounded number of files open."""

    def __init__(self, limit: int = _OPEN_FILES):
        """`limit` files stay open; one not read from lately is closed first."""
        self._limit, self._lock = limit, threading.Lock()
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer only where the file ends. Raises OSError."""
        handle = self._open.get(path) or self._opened(path)
        handle.used = True
        return os.pread(handle.number, size, offset)

    def _opened(self, path: str) -> _Descriptor:
        with self._lock:
            handle = self._open.setdefault(path, _Descriptor(path))
            while len(self._open) > self._limit:  # second chance: those read from since the last look stay
                name, oldest = next(iter(self._open.items()))
                if oldest.used or oldest is handle:
                    oldest.used = False
                    self._open.move_to_end(name)
                else:
                    del self._open[name]
        return handle

    def __getstate__(self) -> dict[str, int]:
        """Worker processes open files of their own."""
        return {"limit": self._limit}

    def __setstate__(self, state: dict[str, int]) -> None:
        """Start with nothing open."""
        self.__init__(state["limit"])


READER = Reader()
