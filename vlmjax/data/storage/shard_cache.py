"""A bounded folder of downloaded and unpacked shards that several processes of a machine share."""

import contextlib
import errno
import fcntl
import functools
import os
import pathlib
import re
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Any

from vlmjax.errors import DataError

_OPEN = 256  # copies kept open by a process
_IDLE = 60.0  # seconds without a read after which a copy is closed
_STAMP = 10.0  # seconds between marks of use
_RECENT = (
    15.0  # seconds after such a mark in which a download ahead leaves a copy alone; longer than between marks
)
_SPARE = 0.05  # of the disk stays free when no limit is given
_POLL = 0.05  # seconds between looks at a copy that another process makes
_PATIENCE = 30.0  # seconds to wait for others to let go of what they hold
Size = int | Callable[[], int]
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def limit_from_environment() -> int | None:
    """Bytes from $VLMJAX_CACHE_LIMIT, such as 200G; None without: the cache may grow until the disk is 95 % full.

    Raises:
        DataError: not a size.
    """
    text = os.environ.get("VLMJAX_CACHE_LIMIT", "").strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", text.upper())
    if text and not match:
        raise DataError(f"VLMJAX_CACHE_LIMIT={text!r} is not a size; write it as 200G or 500M")
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


class Copy:
    """A complete copy, open; it closes itself when the last reader lets go of it."""

    def __init__(self, path: str, number: int):
        """`number` is an open descriptor."""
        self.path, self.number, self.used, self._stamped = path, number, time.monotonic(), 0.0

    def touch(self) -> bool:
        """Mark it as used just now, for the other processes too now and then; False when it was removed meanwhile."""
        if os.fstat(self.number).st_nlink == 0:
            return False
        self.used = time.monotonic()
        if self.used - self._stamped > _STAMP:
            self._stamped = self.used
            with contextlib.suppress(OSError):
                os.utime(self.number)
        return True

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "number"):
            close(self.number)


class ShardCache:
    """Copies by name, at most `limit` bytes together; the one used longest ago goes first, never one that is held.

    A copy that is held has a shared lock on it, in whatever process; who would remove it needs the exclusive one. One
    that is only read from may go: what is open can be read to the end, and is fetched again for the next read. A copy
    in the making is the file `NAME.part` under an exclusive lock, so that others wait for it instead of fetching it
    too, and so that the part of a killed process, which has no lock, is known as waste.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int | None = None):
        """`folder` is made when first needed. `limit` None: until the disk has 5 % left."""
        self.folder, self.limit = pathlib.Path(folder), limit
        self._copies: OrderedDict[str, Copy] = OrderedDict()
        self._lock, self._gates = threading.Lock(), {}

    def has(self, name: str) -> bool:
        """True when a complete copy is there."""
        return (self.folder / name).exists()

    def get(
        self, name: str, size: Size, fill: Callable[[Any], None], keep: Collection[str] | None = None
    ) -> Copy:
        """The copy called `name` to read from, made by `fill(file)` unless it is there.

        Args:
            name: a file name; changed contents need another name.
            size: bytes it will have, for making room, or what gives them when that is needed.
            fill: writes it.
            keep: when given, names that must not go for this one, nor anything used in the last seconds.

        Raises:
            DataError: it cannot be made, or there is no room for it.
            FileNotFoundError: its origin is gone.
        """
        copy = self._copies.get(name)
        if copy is not None and copy.touch():
            return copy
        copy = self._get(name, size, fill, keep, hold=False)
        with self._lock:
            self._copies.pop(name, None)
            self._copies[name] = copy
            self._let_go()
        return copy

    def hold(self, name: str, size: Size, fill: Callable[[Any], None]) -> Copy:
        """As `get`, for use by its path: the copy stays for as long as the result is referred to."""
        return self._get(name, size, fill, None, hold=True)

    def _get(
        self, name: str, size: Size, fill: Callable[[Any], None], keep: Collection[str] | None, hold: bool
    ) -> Copy:
        with self._lock:
            gate = self._gates.setdefault(name, threading.Lock())
        with gate:
            try:
                copy = None
                while copy is None:
                    copy = self._attach(name, hold) or self._make(name, size, fill, keep, hold)
                copy.touch()
                return copy
            except OSError as error:
                if isinstance(error, FileNotFoundError) and error.errno is None:
                    raise
                told = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
                raise DataError(
                    f"cannot bring {name} into the cache {self.folder}: {told}; name another folder with VLMJAX_CACHE"
                ) from error

    def _let_go(self) -> None:
        """Close copies not read from lately, too many, or removed by another process, whose room is free then."""
        oldest = time.monotonic() - _IDLE
        for name, copy in list(self._copies.items()):
            if copy.used < oldest or len(self._copies) > _OPEN or os.fstat(copy.number).st_nlink == 0:
                del self._copies[name]

    def _attach(self, name: str, hold: bool) -> Copy | None:
        """The finished copy, opened, or None. One that vanishes meanwhile is as good as none."""
        path = str(self.folder / name)
        try:
            number = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if hold:
            fcntl.flock(number, fcntl.LOCK_SH)
        if not _is_at(number, path):
            os.close(number)
            return None
        return Copy(path, number)

    def _make(
        self, name: str, size: Size, fill: Callable[[Any], None], keep: Collection[str] | None, hold: bool
    ) -> Copy | None:
        """Make the copy; None when somebody else does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = str(self.folder / name)
        number = _lock_part(path + ".part")
        if number is None:  # another process is at it, or has just finished
            time.sleep(_POLL)
            return None
        try:
            os.truncate(number, 0)
            self._make_room(size() if callable(size) else size, number, keep)
            with os.fdopen(os.dup(number), "wb") as out:
                fill(out)
                out.truncate()
            os.fchmod(number, 0o644)
            os.replace(path + ".part", path)
            fcntl.flock(number, fcntl.LOCK_SH if hold else fcntl.LOCK_UN)
            return Copy(path, os.dup(number))
        finally:
            with contextlib.suppress(FileNotFoundError):
                if _is_at(number, path + ".part"):
                    os.unlink(path + ".part")
            os.close(number)

    def _make_room(self, size: int, part: int, keep: Collection[str] | None) -> None:
        """Remove what was used longest ago until `size` more bytes are allowed, and claim them for `part`."""
        if self.limit is not None and size > self.limit:
            raise DataError(
                f"a file of {size:,} bytes does not fit into the cache {self.folder}, limited to {self.limit:,}; "
                "raise VLMJAX_CACHE_LIMIT"
            )
        until = time.monotonic() + (_PATIENCE if keep is None else 0)
        while True:
            with _locked_folder(self.folder) as entries:
                if self._evict(entries, size, keep):
                    # A sparse file of the full length: counted by all other processes, without being written yet.
                    os.truncate(part, size)
                    return
            if time.monotonic() > until:
                raise DataError(
                    f"no room for {size:,} bytes in the cache {self.folder}: all else in it is held; raise "
                    "VLMJAX_CACHE_LIMIT, or name a folder on a larger disk with VLMJAX_CACHE"
                )
            time.sleep(0.2)

    def _evict(self, entries: list[os.DirEntry], size: int, keep: Collection[str] | None) -> bool:
        with self._lock:
            self._let_go()
        files = sorted(_stamped(entries))
        left = self._allowed(sum(length for _, _, length in files)) - size
        for stamp, name, length in files:
            if left >= 0:
                break
            if keep is not None and (name in keep or time.time() - stamp < _RECENT):
                continue
            with self._lock:
                self._copies.pop(name, None)
            if _remove_unused(str(self.folder / name)):
                left += length
        return left >= 0

    def _allowed(self, used: int) -> int:
        """Bytes that may still be added."""
        if self.limit is not None:
            return self.limit - used
        disk = shutil.disk_usage(self.folder)
        return int(disk.free - _SPARE * disk.total)

    def is_too_large(self, size: int) -> bool:
        """True when a growing file of so many bytes is above the limit or, without one, nearly fills the disk."""
        if self.limit is not None:
            return size > self.limit
        disk = shutil.disk_usage(self.folder)
        return (
            disk.free < _SPARE / 2 * disk.total
        )  # the rest of what is spared is for what nobody could foresee

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process has locks and descriptors of its own."""
        return shared_cache, (str(self.folder), self.limit)


@functools.cache
def shared_cache(folder: str, limit: int | None = None) -> ShardCache:
    """The one cache of this process in a folder."""
    return ShardCache(folder, limit)


def _is_at(number: int, path: str) -> bool:
    """True when the open file is what the path names now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(number), os.stat(path))
    return False


def _lock_part(path: str) -> int | None:
    """The file in the making, open under an exclusive lock; None while another has it.

    Never waits for the lock: its holder keeps it, on the finished file, for as long as it reads from it.
    """
    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(number, path):
            return number
    os.close(number)
    return None


def _remove_unused(path: str) -> bool:
    """Unlink a file nobody has locked. False when it is in use or finished, so renamed; True also when it is gone."""
    try:
        number = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return not path.endswith(".part")
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(number, path):
            return os.fstat(number).st_nlink == 0
        os.unlink(path)
        return True
    except (BlockingIOError, PermissionError):
        return False
    finally:
        os.close(number)


def _stamped(entries: list[os.DirEntry]) -> list[tuple[float, str, int]]:
    """(time of last use, name, bytes) of files, each once, though a part may be finished, and so renamed, meanwhile."""
    out = {}
    for entry in entries:
        for path in (entry.path, entry.path.removesuffix(".part")):
            with contextlib.suppress(FileNotFoundError):
                stat = os.stat(path)
                out[stat.st_ino] = stat.st_mtime, os.path.basename(path), stat.st_size
                break
    return list(out.values())


@contextlib.contextmanager
def _locked_folder(folder: pathlib.Path) -> Iterator[list[os.DirEntry]]:
    """The folder's files while no other process or thread makes room in it."""
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        with os.scandir(folder) as found:
            yield [entry for entry in found if entry.is_file(follow_symlinks=False)]
    finally:
        os.close(number)
