"""Where examples come from: one line of a recipe opened as a random-access source of records."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlmjax.data.conversation import turns_in
from vlmjax.data.formats import arrow, folder, kinds, parquet, tfds
from vlmjax.data.formats.folder import Subset
from vlmjax.data.pictures import image_header
from vlmjax.data.record import Record
from vlmjax.data.scenes import Scenes, open_scenes
from vlmjax.data.storage import files
from vlmjax.errors import BadRecord, DataError

Specification = str | Sequence[str]


@runtime_checkable
class Source(Protocol):
    """Examples by number. Equal `fingerprint`s mean the same data; reading may raise BadRecord.

    A source may also have `key(i)`, `captions_at(i)` and `turns_at(i)`, which read less than the whole example;
    `blocks`, int64 ends of the runs of examples that are near each other, where reading at random is dear;
    `prepare(indices)`, which begins to fetch what these examples are in; and `column(name)`, what its index knows of
    every example. Every source can be pickled and opens its files anew in another process.
    """

    name: str
    fingerprint: str

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, i: int) -> Record:
        """Example i."""


class Concat:
    """Several sources one after the other.

    Attributes:
        blocks: as in `Source`; of a part without blocks the whole is one.
    """

    def __init__(self, sources: Sequence[Source]):
        """The order of `sources` is part of the fingerprint."""
        self._sources = list(sources)
        self._ends = np.cumsum([len(source) for source in self._sources])
        self.name = " + ".join(source.name for source in self._sources)
        self.blocks = self._join_blocks()
        joined = "|".join(source.fingerprint for source in self._sources)
        self.fingerprint = hashlib.sha256(joined.encode()).hexdigest()[:16]

    def _join_blocks(self) -> np.ndarray | None:
        ends = [getattr(source, "blocks", None) for source in self._sources]
        if all(end is None for end in ends):
            return None
        first, out = 0, []
        for source, end in zip(self._sources, ends, strict=True):
            out.append(first + (np.array([len(source)]) if end is None else end))
            first += len(source)
        return np.concatenate(out).astype(np.int64)

    def prepare(self, indices: Sequence[int] | np.ndarray) -> None:
        """Begin to fetch what these examples are in, part by part."""
        indices = np.asarray(indices, np.int64)
        which = np.searchsorted(self._ends, indices, side="right")
        for part in dict.fromkeys(which.tolist()):
            prepare = getattr(self._sources[part], "prepare", None)
            if prepare:
                prepare(indices[which == part] - (int(self._ends[part - 1]) if part else 0))

    def column(self, name: str) -> np.ndarray | None:
        """A column of the parts' indexes, None unless all have it."""
        columns = [getattr(source, "column", lambda name: None)(name) for source in self._sources]
        return None if any(values is None for values in columns) else np.concatenate(columns)

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

    def turns_at(self, i: int) -> list[dict[str, str]]:
        """The conversation of example i, none where it has none."""
        source, at = self._place(i)
        return turns_of(source, at)

    def part_name(self, i: int) -> str:
        """The name of the source that example i is of."""
        return self._place(i)[0].name

    def __getitem__(self, i: int) -> Record:
        """Example i."""
        source, at = self._place(i)
        return source[at]


class EachCaption:
    """A source whose captions are examples of their own, each with its image; an image without any stays one example.

    Attributes:
        blocks: as in `Source`.
    """

    def __init__(self, source: Source):
        """Reads the captions of all examples, once."""
        self._source = source
        self._ends = np.cumsum([self._count(i) for i in range(len(source))], dtype=np.int64)
        blocks = getattr(source, "blocks", None)
        self.blocks = None if blocks is None else self._ends[np.asarray(blocks) - 1]
        self.name, self.fingerprint = source.name, f"{source.fingerprint}:each"

    def _count(self, i: int) -> int:
        try:
            return max(1, len(captions_of(self._source, i)))
        except BadRecord:  # it is met again, counted and told when its turn comes
            return 1

    def _place(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"no example {i}, there are {len(self)}")
        which = int(np.searchsorted(self._ends, i, side="right"))
        return which, i - (int(self._ends[which - 1]) if which else 0)

    def prepare(self, indices: Sequence[int] | np.ndarray) -> None:
        """Begin to fetch what these examples are in."""
        prepare = getattr(self._source, "prepare", None)
        if prepare:
            prepare(np.searchsorted(self._ends, np.asarray(indices, np.int64), side="right"))

    def __len__(self) -> int:
        """Number of captions, and of images without any."""
        return int(self._ends[-1])

    def key(self, i: int) -> str:
        """The key of the image of example i, and the number of its caption."""
        which, caption = self._place(i)
        return f"{key_of(self._source, which)}#{caption}"

    def captions_at(self, i: int) -> tuple[str, ...]:
        """The one caption of example i. Raises BadRecord."""
        which, caption = self._place(i)
        return captions_of(self._source, which)[caption : caption + 1]

    def part_name(self, i: int) -> str:
        """The name of the source that example i is of."""
        part_name = getattr(self._source, "part_name", None)
        return part_name(self._place(i)[0]) if part_name else self._source.name

    def __getitem__(self, i: int) -> Record:
        """Example i. Raises BadRecord."""
        which, caption = self._place(i)
        record = self._source[which]
        captions = record.captions[caption : caption + 1]
        return dataclasses.replace(record, key=f"{record.key}#{caption}", captions=captions)


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


def turns_of(source: Source, i: int) -> list[dict[str, str]]:
    """The conversation of example i as {"from", "value"}, none where it has none. Raises BadRecord.

    Without its images where the source can tell them apart.
    """
    turns = getattr(source, "turns_at", None)
    if callable(turns):
        return turns(i)
    record = source[i]
    return turns_in(record.extra, record.key)


def image_sizes(source: Source, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """(width, height) of examples' images upright, without decoding: int64 [n, 2], zeros where it cannot be told.

    From the source's index where it has one, else from the images' headers, for which the examples are read.
    """
    column = getattr(source, "column", None)
    known = [column(name) for name in ("width", "height")] if column else [None]
    if all(values is not None for values in known):
        return np.stack([values[np.asarray(indices)] for values in known], axis=-1).astype(np.int64)
    return np.array([_size_of(source, int(i)) for i in indices], np.int64).reshape(-1, 2)


def _size_of(source: Source, i: int) -> tuple[int, int]:
    try:
        image = source[i].image
    except BadRecord:  # it is skipped and counted when its turn comes
        return 0, 0
    return image.shape[1::-1] if isinstance(image, np.ndarray) else image_header.size(image) or (0, 0)


def open_source(spec: Specification, **options: Any) -> Source:
    """Open what a recipe calls its data, several parts one after the other. See `open_sources`."""
    return together(open_sources(spec, **options))


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
    """Open each part of what a recipe calls its data.

    Args:
        spec: one of, or several in a tuple or separated by commas:
            `scenes`, `scenes:heldout`, `scenes:train:full`: the drawn world, see `open_scenes`;
            `x-{00000..01242}.tar`, `x-*.tar.gz`, `gs://.../x.tar`: webdataset shards;
            `x.array_record`, `x.tfrecord`, `x.parquet`, `x.arrow`: shards of those kinds, in the same ways;
            `tfds:NAME[:SPLIT]`: a dataset that TFDS has prepared;
            `table.jsonl`, `.json`, `.csv`, `.tsv`: image paths with captions, LLaVA conversations, or interleaved
            documents;
            a folder: what TFDS or `datasets` saved there, its shards, its table, or its images with text files
            beside them.
        seed, image_size: for the drawn scenes; of (height, width) the larger counts, scenes are square.
        exclude: a regular expression; examples whose key it matches (`re.search`) are left out. Not applied to
            drawn scenes, nor is `keep`: their keys say nothing.
        keep: examples for whose key it returns false are left out.
        image_column, caption_columns, image_root: for data whose columns have unusual names.
        cache: where shards are unpacked and downloaded, and indexes kept; see `files.cache_folder`.

    Returns:
        A source for each part, in order, each with at least one example; parts that `exclude` and `keep` leave empty
        are left out.

    Raises:
        DataError: nothing there, unreadable, the same file in two parts, or nothing left after `exclude` and `keep`.
    """
    parts = [part for entry in ([spec] if isinstance(spec, str) else spec) for part in split_spec(entry)]
    if not parts:
        raise DataError("no data given: name shards, a table, a folder, or 'scenes'")
    table = {"image_column": image_column, "caption_columns": caption_columns, "root": image_root}
    side = image_size if isinstance(image_size, int) else max(image_size)
    seen: dict[str, str] = {}
    sources = [_open_part(part, seed, side, table, cache, seen) for part in parts]
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


def _open_part(
    part: str, seed: int, image_size: int, table: dict[str, Any], cache: str | None, seen: dict[str, str]
) -> Source:
    if part == "scenes" or part.startswith("scenes:"):
        _note(part, part, seen)
        return open_scenes(part, seed=seed, image_size=image_size)
    if part.startswith(tfds.PREFIX):
        _note(part, part, seen)
        return tfds.open_tfds(part, **table, cache=cache)
    paths = files.find(part)
    for path in paths:
        _note(path if files.is_remote(path) else os.path.realpath(path), part, seen)
    if len(paths) == 1 and os.path.isdir(paths[0]):
        if tfds.is_dataset(paths[0]):
            return tfds.open_tfds(paths[0], **table, cache=cache)
        paths = _shards_of(paths[0])
        if not paths:
            return folder.open_folder(files.find(part)[0], **table)
    if len(paths) > 1 and all(kinds.kind_of(path) == "table" for path in paths):
        return Concat([folder.TableSource(path, cache=cache, **table) for path in paths])
    return kinds.open_shards(paths, name=part, cache=cache, **table)


def _note(path: str, part: str, seen: dict[str, str]) -> None:
    """Refuse a path met before: its examples would be seen twice as often without anybody having said so."""
    if path in seen:
        other = f"both {seen[path]!r} and {part!r}" if seen[path] != part else f"{part!r} twice"
        raise DataError(
            f"{path} is in {other}: name each file once; to see one source more often, give it a weight"
        )
    seen[path] = part


def _shards_of(path: str) -> list[str]:
    """The shards in a folder: of `datasets`, tars, or one of the other kinds; none where it holds other things."""
    if arrow.is_dataset(path):
        return arrow.files_of(path)
    inside = _listing(path)
    for kind in ("tar", "ArrayRecord", "TFRecord", "Arrow"):
        found = [file for file in inside if kinds.kind_of(file) == kind]
        if found:
            return found
    return parquet.files_of(path)


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

    def wanted(source: Source, i: int) -> bool:
        try:
            key = key_of(source, i)
        except BadRecord:  # it stays, to be counted when it is read
            return True
        return not (pattern and pattern.search(key)) and (keep is None or keep(key))

    left, example = [], ""
    for source in sources:
        if isinstance(source, Scenes):
            left.append(source)
            continue
        rows = [i for i in range(len(source)) if wanted(source, i)]
        example = key_of(source, 0) if not rows else example
        if rows:
            left.append(source if len(rows) == len(source) else Subset(source, np.array(rows, np.int64)))
    if not left:
        names = " + ".join(source.name for source in sources)
        raise DataError(f"{names}: no example (keys such as {example!r}) is left after exclude={exclude!r}")
    return left
