"""The files behind a source, by number: local as they are, gzipped and remote ones through the bounded cache."""

import contextlib
import functools
import gzip
import hashlib
import os
import pathlib
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vlmjax.data.storage import files, gzipped, remote, shard_index
from vlmjax.data.storage.samples import Samples
from vlmjax.data.storage.shard_cache import Copy, limit_from_environment, shared_cache
from vlmjax.data.storage.shard_index import ShardIndex
from vlmjax.errors import BadRecord, DataError

_AHEAD_THREADS = 4
_THREADS = 16
_GIVEN_UP = 60.0  # seconds for which a shard that could not be had is not asked for again


@contextlib.contextmanager
def localize(path: str, cache: str | os.PathLike[str] | None = None) -> Iterator[str]:
    """A local, uncompressed, seekable file with the contents of `path`, which stays until the context ends.

    Raises:
        DataError: unreachable, damaged gzip, or no room in the cache.
    """
    with Shards([path], cache).held(0) as local:
        yield local


class Shards:
    """Some files that are read by number, at any place, from any thread; a process that gets a copy reopens them.

    Remote files are downloaded whole and gzipped ones unpacked, once, into the cache. The copy is named after path,
    size and version, so a changed shard gets a new copy.

    Attributes:
        paths: as the user gave them.
        remote: whether any is not on this machine, so that reading at random is dear.
    """

    def __init__(self, paths: Sequence[str], cache: str | os.PathLike[str] | None = None):
        """Asks what the remote files are; downloads nothing.

        Raises:
            DataError: a file that cannot be reached or is not there.
        """
        self.paths = list(paths)
        self.folder = files.cache_folder(cache)
        for path in self.paths:
            files.refuse_special(path)
        self._cache = shared_cache(str(self.folder / "shards"), limit_from_environment())
        far = [path for path in self.paths if files.is_remote(path)]
        self.remote = bool(far)
        about = dict(zip(far, remote.infos(far), strict=True))
        missing = [path for path, info in about.items() if info is None]
        if missing:
            raise DataError(
                f"cannot reach {missing[0]}: there is no such file"
                + (f" (nor {len(missing) - 1} others of {len(far)})" if len(missing) > 1 else "")
            )
        self._about = [about.get(path) for path in self.paths]
        self._names = [self._name(i) for i in range(len(self.paths))]
        self._ahead: _Ahead | None = None
        self._unseen: dict[int, ShardIndex] = {}  # indexes that were taken on trust: the shard was not here
        self._failed: dict[int, tuple[float, str]] = {}

    def _name(self, i: int) -> str | None:
        """What the copy in the cache is called; None for files that need none."""
        path, about = self.paths[i], self._about[i]
        if about is None:
            if not gzipped.is_gzipped(path):
                return None
            path = os.path.abspath(path)
            try:
                stat = os.stat(path)
            except OSError as error:
                raise DataError(f"cannot read {path}: {error}") from error
            version = f"{stat.st_size}|{stat.st_mtime_ns}"
        else:
            version = about.version
        digest = hashlib.sha256(f"{path}|{version}".encode()).hexdigest()[:16]
        name = path.rstrip("/").rsplit("/", 1)[-1].split("?")[0]
        return f"{digest}-{gzipped.plain_name(name)}"

    def _copy(self, i: int, keep: set[str] | None = None, hold: bool = False) -> Copy:
        path, name = self.paths[i], self._names[i]
        size, fill = functools.partial(self._size, i), functools.partial(self._fill, i)
        try:
            copy = self._cache.hold(name, size, fill) if hold else self._cache.get(name, size, fill, keep)
        except FileNotFoundError as error:
            raise DataError(f"cannot read {path}: it is no longer there") from error
        if i in self._unseen:  # made by somebody else, who knew nothing of this index
            self._compare(i, copy.number)
        return copy

    def _size(self, i: int) -> int:
        """Bytes that the copy of file i will have, 0 where nobody knows."""
        packed, path = self._packed(i), self.paths[i]
        return gzipped.unpacked_size(path, packed) if gzipped.is_gzipped(path) else packed

    def _packed(self, i: int) -> int:
        about = self._about[i]
        return os.path.getsize(self.paths[i]) if about is None else about.size or 0

    def _fill(self, i: int, out: Any) -> None:
        """Write the copy of file i. One that lately could not be had fails at once: each attempt takes seconds."""
        when, why = self._failed.get(i, (0.0, ""))
        if why and time.monotonic() - when < _GIVEN_UP:
            raise DataError(why)
        try:
            self._bring(i, out)
            out.truncate()
            out.flush()
            self._compare(i, out.fileno())
        except DataError as error:
            self._failed[i] = time.monotonic(), str(error)
            raise
        self._failed.pop(i, None)

    def _compare(self, i: int, number: int) -> None:
        """Raise DataError when the index that was used for file i, before it was here, is not that of its bytes."""
        index = self._unseen.get(i)
        if index is None:
            return
        if not index.fits(number):
            with contextlib.suppress(OSError):
                if pathlib.Path(index.path).is_relative_to(self.folder):
                    os.unlink(index.path)
            raise DataError(
                f"{self.paths[i]}: its index ({index.path}) belongs to other contents, of the same length or "
                f"unpacked; run `python -m vlmjax.data.index --force {self.paths[i]}` and start again, and replace "
                f"the file {shard_index.ENDING} beside the shard where there is one"
            )
        self._unseen.pop(i, None)

    def _bring(self, i: int, out: Any) -> None:
        path, about = self.paths[i], self._about[i]
        unpack = gzipped.is_gzipped(path)

        def write(stream: Any) -> None:
            out.seek(0)  # what is cut off at the end: until then the length is a claim to room
            if unpack:
                self._unpack(path, stream, out)
            else:
                remote.copy(stream, out)

        if about is not None:
            remote.download(path, about, write)
            return
        try:
            with open(path, "rb") as packed:
                write(packed)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is damaged and cannot be unpacked: {error}") from error

    def _unpack(self, path: str, stream: Any, out: Any) -> None:
        """Gzipped bytes into a file. Raises DataError where they become more than there is room for."""
        unpacked, count = gzip.GzipFile(fileobj=stream, mode="rb"), 0
        while data := unpacked.read(1 << 20):
            count += len(data)
            if self._cache.is_too_large(count):
                raise DataError(
                    f"{path} unpacks to more than the cache {self.folder} has room for (over {count:,} bytes); raise "
                    "VLMJAX_CACHE_LIMIT, or name a folder on a larger disk with VLMJAX_CACHE"
                )
            out.write(data)

    def file(self, i: int) -> tuple[str, Copy | None]:
        """A local path with the contents of file i, and what must be referred to for as long as that is used.

        Raises:
            DataError: it cannot be had.
        """
        if self._names[i] is None:
            return self.paths[i], None
        copy = self._copy(i, hold=True)
        return copy.path, copy

    @contextlib.contextmanager
    def held(self, i: int) -> Iterator[str]:
        """As `file`, for a while: the path is good until the context ends. Raises DataError."""
        path, copy = self.file(i)
        try:
            yield path
        finally:
            del copy

    def must_fit_together(self) -> None:
        """Raise DataError unless the cache has room for all files at once, as those need that are mapped."""
        wanted, limit = sum(about.size or 0 for about in self._about if about), self._cache.limit
        if limit is not None and wanted > limit:
            raise DataError(
                f"{self.paths[0]}: its {len(self.paths)} file(s) are {wanted:,} bytes, which must be in the cache "
                f"{self.folder} together, limited to {limit:,}; raise VLMJAX_CACHE_LIMIT, or convert them to shards "
                "with python -m vlmjax.data.convert"
            )

    def read(self, i: int, offset: int, size: int, key: str) -> bytes:
        """`size` bytes of file i. Raises BadRecord, for the record `key`, where they cannot be had."""
        try:
            if self._names[i] is None:
                data = files.READER.read(self.paths[i], offset, size)
            else:
                copy = self._copy(
                    i
                )  # referred to until the read is over: else it may close, its number be reused
                data = os.pread(copy.number, size, offset)
        except (OSError, DataError) as error:
            raise BadRecord("unreadable_shard", key, f"{self.paths[i]}: {error}") from error
        if len(data) != size:
            raise BadRecord("truncated_shard", key, f"{self.paths[i]}: {len(data)} of {size} bytes")
        return data

    def prepare(self, numbers: Iterable[int]) -> None:
        """Begin to download these files, in this order, behind the scenes; failures show when they are read."""
        cached = [i for i in dict.fromkeys(numbers) if self._names[i] is not None]
        wanted = [i for i in cached if not self._cache.has(self._names[i])]
        if wanted:
            self._ahead = self._ahead or _Ahead()
            keep = {self._names[i] for i in cached}
            self._ahead.add([(self._names[i], functools.partial(self._copy, i, keep)) for i in wanted])

    def indexes(self, build: Callable[[str], Samples]) -> list[ShardIndex]:
        """The index of every file, see `shard_index.open_index`; a remote one beside its shard saves the download.

        Raises:
            DataError: a file that cannot be read.
        """
        with ThreadPoolExecutor(self._threads()) as pool:
            return list(pool.map(lambda i: self.index(i, build), range(len(self.paths))))

    def _threads(self) -> int:
        """No more than the cache has room for shards: each is held until its index is made, the others wait."""
        return min(_THREADS, len(self.paths) or 1, self.room(_THREADS))

    def room(self, most: int) -> int:
        """How many files may be held at a time, from 1 to `most`, in a cache that has a limit.

        Gzipped ones are taken to shrink as the first of them does: to ask after each costs a request.
        """
        limit, cached = self._cache.limit, [i for i, name in enumerate(self._names) if name is not None]
        if limit is None or not cached:
            return most
        packed = {i: self._packed(i) for i in cached}
        largest = max(cached, key=packed.get)
        zipped = next((i for i in cached if gzipped.is_gzipped(self.paths[i])), None)
        growth = self._size(zipped) / max(1, packed[zipped]) if zipped is not None else 1.0
        return max(1, min(most, int(limit / max(1.0, packed[largest] * growth))))

    def index_place(self, i: int) -> pathlib.Path:
        """Where the cache keeps the index of file i: a name of its own for each version of a remote shard."""
        if self._about[i] is None:
            return shard_index.place_in_cache(self.paths[i], self.folder)
        return self.folder / "indexes" / f"{self._names[i]}{shard_index.ENDING}"

    def index(self, i: int, build: Callable[[str], Samples], anew: bool = False) -> ShardIndex:
        """The index of file i; `anew` ignores and replaces what is kept. Raises DataError."""
        path, kept = self.paths[i], self.index_place(i)
        if anew:
            self._unseen.pop(i, None)
        elif self._about[i] is None:
            with self.held(i) as local:
                return shard_index.open_index(path, local, self.folder, build)
        else:
            found = self._known_index(i, kept)
            if found is not None:
                return found
        with self.held(i) as local:
            return shard_index.make(local, kept, build)

    def _known_index(self, i: int, kept: pathlib.Path) -> ShardIndex | None:
        """The index of a remote shard from the cache, or a fuller one of the same contents from beside the shard."""
        beside = kept.with_name(kept.name + ".beside")
        self._fetch_index(self.paths[i], beside)
        here = self._cache.has(self._names[i])
        own = shard_index.find([kept], lambda index: self._fits(i, index, here))
        other = shard_index.find([beside], lambda index: self._fits(i, index, here))
        found = own or other
        if own and other and own.probe_at == other.probe_at and own.probe == other.probe:
            found = max(own, other, key=lambda index: len(index.columns))
        if found is not None and not here:
            self._unseen[i] = found
        return found

    def _fetch_index(self, path: str, place: Any) -> None:
        """The side file of a remote shard into the cache, unless it is there, or there is none."""
        if place.exists() or "?" in path:
            return
        data = remote.small(path + shard_index.ENDING)
        if data is not None:
            try:
                shard_index.write_whole(place, data)
            except OSError as error:
                raise DataError(f"cannot write {place}: {error}") from error

    def _fits(self, i: int, index: ShardIndex, here: bool) -> bool:
        """By bytes all over it where the shard is here; else by its length (unknown for gzipped ones)."""
        if here:
            with self.held(i) as local:
                return index.fits(local)
        return gzipped.is_gzipped(self.paths[i]) or self._about[i].size in (None, index.size)

    def __getstate__(self) -> dict[str, Any]:
        """Without the threads that download ahead: a worker process only reads."""
        return self.__dict__ | {"_ahead": None, "_unseen": dict(self._unseen), "_failed": {}}


class _Ahead:
    """A few threads that download shards before they are needed; they end with the process, whatever they do."""

    def __init__(self) -> None:
        self._queue: deque[tuple[str, Callable[[], Any]]] = deque()
        self._known: set[str] = set()
        self._lock, self._threads = threading.Lock(), 0

    def add(self, jobs: Sequence[tuple[str, Callable[[], Any]]]) -> None:
        with self._lock:
            for name, job in jobs:
                if name not in self._known:
                    self._known.add(name)
                    self._queue.append((name, job))
            while self._threads < min(_AHEAD_THREADS, len(self._queue)):
                self._threads += 1
                threading.Thread(target=self._work, name="vlmjax-ahead", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._threads -= 1
                    return
                name, job = self._queue.popleft()
            try:
                job()
            except Exception as error:  # the reader of this shard meets it again, and reports it
                files.LOG.debug("download ahead of %s: %s", name, error)
            with self._lock:
                self._known.discard(name)
