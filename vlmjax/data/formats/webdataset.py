"""Webdataset shards: tar files read at random through an index of offsets, without unpacking them."""

import bisect
import functools
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmjax.data.conversation import turns_in
from vlmjax.data.formats import tar
from vlmjax.data.formats.fields import (
    TEXT_EXTENSIONS,
    captions_of,
    image_extension,
    parse_json,
    says_more,
    tidy,
)
from vlmjax.data.record import Record
from vlmjax.data.storage import shard_index
from vlmjax.data.storage.samples import Samples
from vlmjax.data.storage.shard_index import Damaged, ShardIndex
from vlmjax.data.storage.shards import Shards
from vlmjax.errors import BadRecord, DataError

_TOGETHER = 1 << 14  # bytes read at once rather than by several reads
_log = logging.getLogger(__name__)


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

    def __reduce__(self) -> tuple[Any, ...]:
        """As a plain dict, read: another process has no part in this one's files."""
        return dict, (dict(self.items()),)


class IndexedShards:
    """Shards whose samples are found through an index of offsets: what tar and TFRecord sources have in common.

    Attributes:
        name: of the source.
        fingerprint: changes when shards, their order or their contents' layout change; not when they are moved.
        blocks: int64 [shards], where each shard's samples end, when shards have to be downloaded, so that reading
            across all of them is dear; else None.
    """

    def __init__(
        self,
        paths: Sequence[str],
        build: Callable[[str], Samples],
        *,
        name: str = "",
        cache: str | None = None,
    ):
        """Open or make the index of every shard.

        Raises:
            DataError: a shard that cannot be read or is of another kind.
        """
        self.paths, self.name, self._build = list(paths), name or paths[0], build
        self._shards = Shards(self.paths, cache)
        self._indexes = self._shards.indexes(build)
        self._mending = threading.Lock()
        for path, index in zip(self.paths, self._indexes, strict=True):
            for note in index.notes:
                _log.warning("%s: %s", path, note)
        self._ends = np.cumsum([index.count for index in self._indexes], dtype=np.int64)
        self._places = self._ends.tolist()  # a search in a list costs a tenth of numpy's
        self.blocks = self._ends if self._shards.remote else None
        digest = hashlib.sha256()
        for path, index in zip(self.paths, self._indexes, strict=True):
            digest.update(f"{os.path.basename(path)}|{index.count}|{index.size}|{index.digest}".encode())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        """Number of samples in all shards."""
        return self._places[-1] if self._places else 0

    def place(self, i: int) -> tuple[int, int]:
        """(shard, number inside it) of sample i."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name}: no sample {i}, there are {len(self)}")
        shard = bisect.bisect_right(self._places, i)
        return shard, i - (self._places[shard - 1] if shard else 0)

    def samples(self, shard: int) -> Samples:
        """The index of one shard. Raises BadRecord when it was damaged meanwhile and cannot be made again."""
        index = self._indexes[shard]
        try:
            return index.samples()
        except (Damaged, OSError) as error:
            return self._mend(shard, index, error)

    def _mend(self, shard: int, broken: ShardIndex, error: Exception) -> Samples:
        with self._mending:
            if self._indexes[shard] is broken:
                _log.warning("%s is not a usable index: %s; its shard is read anew", broken.path, error)
                try:
                    fresh = self._shards.index(shard, self._build, anew=True)
                except DataError as failure:
                    raise BadRecord("unreadable_shard", f"{self.paths[shard]}", str(failure)) from failure
                if (fresh.count, fresh.digest) != (broken.count, broken.digest):
                    raise BadRecord(
                        "changed_shard", f"{self.paths[shard]}", "its samples are not those it had"
                    )
                self._indexes[shard] = fresh
            return self._indexes[shard].samples()

    def key(self, i: int) -> str:
        """The key of sample i, without reading it."""
        shard, at = self.place(i)
        return self.samples(shard).key(at)

    def prepare(self, indices: Sequence[int] | np.ndarray) -> None:
        """Begin to download the shards of these samples, in their order; does not wait for them."""
        if not self._shards.remote:
            return
        shards = np.searchsorted(self._ends, np.asarray(indices, np.int64), side="right")
        _, first = np.unique(shards, return_index=True)
        self._shards.prepare(shards[np.sort(first)].tolist())

    def column(self, name: str) -> np.ndarray | None:
        """One value per sample from the index ("width", "height", "tokens:NAME"); None unless all shards have it."""
        if not all(name in index.columns for index in self._indexes):
            return None
        return np.concatenate([self.samples(shard).columns[name] for shard in range(len(self._indexes))])

    def add_column(self, name: str, values: np.ndarray) -> None:
        """Keep one non-negative integer per sample in the side files under `name`.

        They are written where they are, or into the cache where that is not allowed.
        """
        begin = 0
        for shard, index in enumerate(self._indexes):
            samples = self.samples(shard)
            part = values[begin : begin + index.count]
            begin += index.count
            self._indexes[shard] = shard_index.with_column(
                index, samples, name, part, self._shards.index_place(shard)
            )

    def __getstate__(self) -> dict[str, Any]:
        """A worker process opens files and locks of its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_mending"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As it was, with a lock of its own."""
        self.__dict__.update(state, _mending=threading.Lock())


class TarSource(IndexedShards):
    """Image-text pairs in tar shards, any of them at any time: `source[i] -> Record`.

    A sample's image is its member with an image extension, its captions are its `.txt` member and the caption
    fields of its `.json`; all other members are in `record.extra`, read when looked up.
    """

    def __init__(self, paths: Sequence[str], *, name: str = "", cache: str | None = None):
        """Index the shards (gzipped and remote ones through the cache).

        Raises:
            DataError: a shard that cannot be read or is no tar, or shards without any sample.
        """
        super().__init__(paths, tar.index, name=name, cache=cache)
        if not len(self):
            raise DataError(
                f"{self.name}: {len(self.paths)} tar file(s) hold no sample (files named key.jpg, key.txt)"
            )

    def captions_at(self, i: int) -> tuple[str, ...]:
        """The captions of sample i, without its image. Raises BadRecord."""
        shard, at = self.place(i)
        samples = self.samples(shard)
        codes, offsets, sizes = samples.members(at)
        return self._captions(shard, samples.key(at), _roles(codes, samples.extensions), offsets, sizes)

    def turns_at(self, i: int) -> list[dict[str, str]]:
        """The conversation in the `.json` of sample i, none where none is; its image is not read. Raises BadRecord."""
        shard, at = self.place(i)
        samples = self.samples(shard)
        key, (codes, offsets, sizes) = samples.key(at), samples.members(at)
        json = _roles(codes, samples.extensions).json
        if json is None:
            return []
        return turns_in({"json": self._shards.read(shard, offsets[json], sizes[json], key)}, key)

    def _captions(
        self, shard: int, key: str, roles: "_Roles", offsets: list[int], sizes: list[int]
    ) -> tuple[str, ...]:
        found = self._read_near(shard, key, [(offsets[j], sizes[j]) for j in roles.captions])
        captions = []
        for j, data in zip(roles.captions, found, strict=True):
            if j != roles.json:
                captions.append(data.decode("utf-8", "replace"))
            elif len(found) != 2 or says_more(data, found[0]):
                captions += captions_of(parse_json(data, key), key)
        return tidy(captions)

    def _read_near(self, shard: int, key: str, places: list[tuple[int, int]]) -> list[bytes]:
        """Several members by one read where they lie together, as small ones do."""
        read = self._shards.read
        if len(places) == 2:
            (first, a), (second, b) = places
            if 0 <= second - first <= _TOGETHER and b <= _TOGETHER:
                data = read(shard, first, second - first + b, key)
                return [data[:a], data[second - first :]]
        return [read(shard, at, size, key) for at, size in places]

    def __getitem__(self, i: int) -> Record:
        """Sample i. Raises BadRecord when it has no image or its bytes cannot be read."""
        shard, at = self.place(i)
        samples = self.samples(shard)
        key, (codes, offsets, sizes) = samples.key(at), samples.members(at)
        roles = _roles(codes, samples.extensions)
        if roles.image is None:
            raise BadRecord("no_image", key, f"members {', '.join(samples.parts(at))}")
        image = self._shards.read(shard, offsets[roles.image], sizes[roles.image], key)
        captions = self._captions(shard, key, roles, offsets, sizes)
        rest = {name: (offsets[j], sizes[j]) for name, j in roles.rest}
        extra = LazyMembers(rest, lambda at, n: self._shards.read(shard, at, n, key)) if rest else {}
        return Record(key, image, captions, extra)


class _Roles(NamedTuple):
    """Which member of a sample is what: positions among its members."""

    image: int | None
    captions: tuple[int, ...]
    json: int | None
    rest: tuple[tuple[str, int], ...]


@functools.lru_cache(maxsize=4096)  # hardly more than one kind of sample in a data set
def _roles(codes: bytes, extensions: tuple[str, ...]) -> _Roles:
    kind = next(k for k in (np.uint8, np.uint16, np.uint32) if len(extensions) - 1 <= np.iinfo(k).max)
    names = [extensions[code] for code in np.frombuffer(codes, kind)]
    image = image_extension(names)
    texts = [names.index(name) for name in TEXT_EXTENSIONS if name in names]
    json = names.index("json") if "json" in names else None
    rest = tuple((name, j) for j, name in enumerate(names) if name != image and name not in TEXT_EXTENSIONS)
    return _Roles(
        None if image is None else names.index(image), (*texts, *([] if json is None else [json])), json, rest
    )
