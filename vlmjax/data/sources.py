"""Where examples come from: one line of a recipe opened as a random-access source of records."""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlmjax.data import files, folder
from vlmjax.data.folder import Subset
from vlmjax.data.record import Record
from vlmjax.data.scenes import Scenes, open_scenes
from vlmjax.data.webdataset import TarSource
from vlmjax.errors import DataError

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
Specification = str | Sequence[str]


@runtime_checkable
class Source(Protocol):
    """Examples by number. Equal `fingerprint`s mean the same data; reading may raise BadRecord."""

    name: str
    fingerprint: str

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, i: int) -> Record:
        """Example i."""


class Concat:
    """Several sources one after the other."""

    def __init__(self, sources: Sequence[Source]):
        """The order of `sources` is part of the fingerprint."""
        self._sources = list(sources)
        self._ends = np.cumsum([len(source) for source in self._sources])
        self.name = " + ".join(source.name for source in self._sources)
        joined = "|".join(source.fingerprint for source in self._sources)
        self.fingerprint = hashlib.sha256(joined.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """Number of examples in all."""
        return int(self._ends[-1])

    def _place(self, i: int) -> tuple[Source, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"no example {i}, there are {len(self)}")
        which = int(np.searchsorted(self._ends, i, side="right"))
        return self._sources[which], i - (int(self._ends[which - 1]) if which else 0)

    def key(self, i: int) -> str:
        """The key of example i."""
        source, at = self._place(i)
        return key_of(source, at)

    def captions_at(self, i: int) -> tuple[str, ...]:
        """The captions of example i."""
        source, at = self._place(i)
        return captions_of(source, at)

    def part_name(self, i: int) -> str:
        """The name of the source that example i is of."""
        return self._place(i)[0].name

    def __getitem__(self, i: int) -> Record:
        """Example i."""
        source, at = self._place(i)
        return source[at]


def together(sources: Sequence[Source]) -> Source:
    """One source of all: the only one itself, or several one after the other."""
    return sources[0] if len(sources) == 1 else Concat(sources)


def key_of(source: Source, i: int) -> str:
    """The key of example i, without reading the image where the source can tell."""
    key = getattr(source, "key", None)
    return key(i) if callable(key) else source[i].key


def captions_of(source: Source, i: int) -> tuple[str, ...]:
    """The captions of example i, without its image where the source can tell them apart."""
    captions = getattr(source, "captions_at", None)
    return captions(i) if callable(captions) else source[i].captions


def open_source(
    spec: Specification,
    *,
    seed: int = 0,
    image_size: int | Sequence[int] = 64,
    exclude: str | None = None,
    keep: Callable[[str], bool] | None = None,
    image_column: str | None = None,
    caption_columns: Sequence[str] | str | None = None,
    image_root: str | None = None,
    cache: str | None = None,
) -> Source:
    """Open what a recipe calls its data.

    Args:
        spec: one of, or several in a tuple or separated by commas (then one after the other):
            `scenes`, `scenes:heldout`, `scenes:train:full`: the drawn world, see `open_scenes`;
            `x-{00000..01242}.tar`, `x-*.tar.gz`, `gs://.../x.tar`: webdataset shards;
            `table.jsonl`, `.csv`, `.tsv`: image paths with captions;
            a folder: its shards, its table, or its images with text files beside them.
        seed, image_size: for the drawn scenes; of (height, width) the larger counts, scenes are square.
        exclude: a regular expression; examples whose key it matches (`re.search`) are left out. Not applied to
            drawn scenes, nor is `keep`: their keys say nothing.
        keep: examples for whose key it returns false are left out.
        image_column, caption_columns, image_root: for tables whose columns have unusual names.
        cache: where shards are unpacked and downloaded; see `files.cache_folder`.

    Returns:
        A source with at least one example.

    Raises:
        DataError: nothing there, unreadable, or nothing left after `exclude` and `keep`.
    """
    table = {"image_column": image_column, "caption_columns": caption_columns, "image_root": image_root}
    return together(
        open_sources(spec, seed=seed, image_size=image_size, exclude=exclude, keep=keep, cache=cache, **table)
    )


def open_sources(
    spec: Specification,
    *,
    seed: int = 0,
    image_size: int | Sequence[int] = 64,
    exclude: str | None = None,
    keep: Callable[[str], bool] | None = None,
    image_column: str | None = None,
    caption_columns: Sequence[str] | str | None = None,
    image_root: str | None = None,
    cache: str | None = None,
) -> list[Source]:
    """Like `open_source`, with each part of `spec` a source of its own, for a mixture."""
    parts = [part for entry in ([spec] if isinstance(spec, str) else spec) for part in split_spec(entry)]
    if not parts:
        raise DataError("no data given: name shards, a table, a folder, or 'scenes'")
    table = {"image_column": image_column, "caption_columns": caption_columns, "root": image_root}
    side = image_size if isinstance(image_size, int) else max(image_size)
    sources = [_open_part(part, seed, side, table, cache) for part in parts]
    return _filtered(sources, exclude, keep)


def split_spec(spec: str) -> list[str]:
    """Cut at commas outside braces: 'a-{0,1}.tar,b.tar' -> ['a-{0,1}.tar', 'b.tar']."""
    parts, depth = [""], 0
    for character in str(spec):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _open_part(part: str, seed: int, image_size: int, table: dict[str, Any], cache: str | None) -> Source:
    if part == "scenes" or part.startswith("scenes:"):
        return open_scenes(part, seed=seed, image_size=image_size)
    paths = files.find(part)
    if len(paths) == 1 and os.path.isdir(paths[0]):
        shards = [path for path in _listing(paths[0]) if path.endswith(TAR_ENDINGS)]
        if not shards:
            return folder.open_folder(paths[0], **table)
        paths = shards
    if all(path.endswith(TAR_ENDINGS) for path in paths):
        return TarSource(paths, name=part, cache=cache)
    tables = [files.localize(path, cache) for path in paths if path.lower().endswith(folder.TABLES)]
    if len(tables) == len(paths):
        opened = [folder.TableSource(path, **table) for path in tables]
        return opened[0] if len(opened) == 1 else Concat(opened)
    odd = next(
        path for path in paths if not path.endswith(TAR_ENDINGS) and not path.lower().endswith(folder.TABLES)
    )
    raise DataError(
        f"{odd}: not a kind of data; expected {', '.join(TAR_ENDINGS + folder.TABLES)} or a folder"
    )


def _listing(path: str) -> list[str]:
    return sorted(os.path.join(path, name) for name in os.listdir(path))


def _filtered(sources: list[Source], exclude: str | None, keep: Callable[[str], bool] | None) -> list[Source]:
    """The sources without the examples that the two filters leave out, and without sources left empty."""
    if not exclude and keep is None:
        return sources
    try:
        pattern = re.compile(exclude) if exclude else None
    except re.error as error:
        raise DataError(f"exclude={exclude!r} is not a regular expression: {error}") from error

    def wanted(key: str) -> bool:
        return not (pattern and pattern.search(key)) and (keep is None or keep(key))

    left, example = [], ""
    for source in sources:
        if isinstance(source, Scenes):
            left.append(source)
            continue
        rows = [i for i in range(len(source)) if wanted(key_of(source, i))]
        example = key_of(source, 0)
        if rows:
            left.append(source if len(rows) == len(source) else Subset(source, np.array(rows, np.int64)))
    if not left:
        names = " + ".join(source.name for source in sources)
        raise DataError(f"{names}: no example (keys such as {example!r}) is left after exclude={exclude!r}")
    return left
