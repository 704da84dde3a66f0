"""The samples of one shard in flat arrays: keys, places and sizes of their members, columns of numbers."""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Groups = Sequence[tuple[str, Sequence[tuple[str, int, int]]]]


class Samples(NamedTuple):
    """The samples of one shard in flat arrays, small enough to keep for millions of them.

    Sample i has key `keys[key_at[i]:key_at[i+1]]` and the members `first[i]:first[i+1]`; member j holds
    `size[j]` bytes at `offset[j] * unit`, its extension is `extensions[extension[j]]`.

    Attributes:
        keys: uint8, all keys in UTF-8 one after the other.
        key_at, first: uint32 (uint64 where needed) [samples + 1].
        offset, size: uint32 (uint64 where needed) [members].
        extension: uint8 (uint16 where needed) [members].
        columns: one value per sample under each name: "width" and "height" in pixels, upright, 0 where unknown;
            "tokens:NAME" the length in tokens of the longest caption under tokenizer NAME, when added.
        notes: what is wrong with the shard, to be told whenever it is opened.
    """

    keys: np.ndarray
    key_at: np.ndarray
    first: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    extension: np.ndarray
    extensions: tuple[str, ...]
    unit: int
    columns: dict[str, np.ndarray]
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.first) - 1

    def key(self, i: int) -> str:
        """The key of sample i."""
        a, b = self.key_at[i : i + 2].tolist()
        return self.keys[a:b].tobytes().decode()

    def parts(self, i: int) -> dict[str, tuple[int, int]]:
        """Extension -> (offset, size) in bytes of sample i, in the shard's order."""
        a, b = self.first[i : i + 2].tolist()
        kinds, starts = self.extension[a:b].tolist(), self.offset[a:b].tolist()
        names, unit, sizes = self.extensions, self.unit, self.size[a:b].tolist()
        return {names[kinds[j]]: (starts[j] * unit, sizes[j]) for j in range(b - a)}

    def members(self, i: int) -> tuple[bytes, list[int], list[int]]:
        """(codes of the extensions, offsets in bytes, sizes) of sample i: `parts` for those in a hurry."""
        a, b = self.first[i : i + 2].tolist()
        unit = self.unit
        offsets = [at * unit for at in self.offset[a:b].tolist()]
        return self.extension[a:b].tobytes(), offsets, self.size[a:b].tolist()

    def digest(self) -> str:
        """Tells apart shards with other keys or sizes; the same wherever the shard lies."""
        out = hashlib.sha256(f"{self.count}|{self.extensions}".encode())
        for values in (self.keys, self.key_at.astype("<u8"), self.size.astype("<u8")):
            out.update(values.tobytes())
        return out.hexdigest()[:16]


def flatten(
    groups: Groups,
    shapes: Mapping[int, tuple[int, int]] | None = None,
    unit: int = 512,
    notes: Sequence[str] = (),
) -> Samples:
    """Arrays of samples given as (key, [(extension, offset, size), ...]); all offsets are multiples of `unit`.

    `shapes` maps a sample's number to the (width, height) of its image; without it there are no such columns.
    """
    codes: dict[str, int] = {}
    key_at, first = array("Q", [0]), array("Q", [0])
    offsets, sizes, kinds, keys = array("Q"), array("Q"), array("L"), bytearray()
    for key, parts in groups:
        keys += key.encode("utf-8", "replace")
        key_at.append(len(keys))
        first.append(first[-1] + len(parts))
        for extension, offset, size in parts:
            offsets.append(offset // unit)
            sizes.append(size)
            kinds.append(codes.setdefault(extension, len(codes)))
    columns = {}
    if shapes is not None:
        both = np.zeros((2, len(groups)), np.uint64)
        for at, shape in shapes.items():
            both[:, at] = shape
        columns = {"width": narrow(both[0], np.uint16), "height": narrow(both[1], np.uint16)}
    return Samples(
        np.frombuffer(bytes(keys), np.uint8),
        *(narrow(np.array(values, np.uint64), np.uint32) for values in (key_at, first, offsets, sizes)),
        narrow(np.array(kinds, np.uint64), np.uint8),
        tuple(codes),
        unit,
        columns,
        tuple(notes),
    )


def narrow(values: np.ndarray, smallest: type) -> np.ndarray:
    """The values as the first of `smallest`, the next larger, ... that holds them."""
    kinds = [np.uint8, np.uint16, np.uint32, np.uint64]
    top = int(values.max()) if len(values) else 0
    kind = next(k for k in kinds[kinds.index(smallest) :] if top <= np.iinfo(k).max)
    return values.astype(kind)
