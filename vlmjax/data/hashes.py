"""Which pictures are the same, or nearly: digests of files, perceptual hashes, and pairs within a few bits."""

import hashlib
import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

_SIDE = 32  # pixels of the small picture that is hashed
_FREQUENCIES = 8
_COLORS = 8  # the picture's colours are kept on a grid of this side
COLORS = 3 * _COLORS**2  # bytes
# Differences of that grid that are still the same picture, in grey levels. Drawings that differ in a detail share
# their hash; the largest difference tells them apart.
_MEAN_LEVELS, _MOST_LEVELS = 8.0, 32
_NEIGHBOURS = 300
_LUMA = np.array([0.299, 0.587, 0.114])


def digest(image: bytes | np.ndarray) -> bytes:
    """16 bytes that two images share only when their bytes (or pixels and shape) are equal: of SHA-256."""
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()[:16]
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest()[:16]


class Look(NamedTuple):
    """How a picture looks: a 64-bit hash of its shapes, and its colours as uint8 [192]."""

    hash: int
    colors: np.ndarray


def _cosines() -> np.ndarray:
    """The lowest rows of the discrete cosine transform (type 2): float64 [8, 32]."""
    waves, places = np.arange(_FREQUENCIES)[:, None], np.arange(_SIDE)[None, :]
    return np.cos(np.pi * waves * (2 * places + 1) / (2 * _SIDE))


_DCT = _cosines()


def look(pixels: np.ndarray) -> Look:
    """The perceptual hash of uint8 [h, w, 3] (Zauner 2010): signs of low frequencies against their median.

    The mean brightness is left out, so 63 bits carry meaning. Of photographs scaled to a half and recompressed at
    quality 60, 98 % keep within 4 bits; of those cropped by 4 %, half. Frequencies weaker than a hundredth of a grey
    level count as none: a flat picture has hash 0.
    """
    small = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    small = np.asarray(small, np.float64)
    waves = (_DCT @ (small @ _LUMA) @ _DCT.T).ravel()[1:] / _SIDE**2
    waves = np.where(np.abs(waves) < 0.01, 0.0, waves)
    bits = waves > np.median(waves)
    block = _SIDE // _COLORS
    colors = small.reshape(_COLORS, block, _COLORS, block, 3).mean(axis=(1, 3))
    number = int.from_bytes(np.packbits(np.concatenate([[False], bits])).tobytes(), "big")
    return Look(number, colors.round().astype(np.uint8).ravel())


def near_pairs(hashes: np.ndarray, colors: np.ndarray, bits: int = 4) -> np.ndarray:
    """Pairs of pictures that look the same: at most `bits` of the hash differ, and colours differ little.

    Cut into bits + 2 blocks, two hashes within `bits` agree in at least two blocks; so hashes are sorted by each pair
    of blocks and only equal neighbours compared: about n log n. More than 300 different pictures that share two
    blocks are compared with the nearest 300 in brightness.

    Args:
        hashes: uint64 [n].
        colors: uint8 [n, 192].
        bits: 0 to 8.

    Returns:
        int64 [pairs, 2], the earlier first; of many equal ones each is paired with the first alone.
    """
    hashes = np.asarray(hashes, np.uint64)
    if not len(hashes):
        return np.zeros((0, 2), np.int64)
    firsts = repeats(_folded(hashes, colors))
    # Should two different ones have been folded to one number, both are kept.
    firsts[(hashes[firsts] != hashes) | (colors[firsts] != colors).any(axis=1)] = -1
    itself = np.arange(len(hashes))
    later = np.flatnonzero((firsts >= 0) & (firsts != itself))
    found = [np.column_stack([firsts[later], later])]
    kept = np.setdiff1d(itself, later)
    found += [kept[pairs] for pairs in _within(hashes[kept], colors[kept], bits)]
    pairs = np.sort(np.concatenate(found), axis=1)
    return np.unique(pairs, axis=0)


def _within(hashes: np.ndarray, colors: np.ndarray, bits: int):
    """Pairs of different pictures, some more than once."""
    brightness = colors.sum(axis=1, dtype=np.int64)
    for mask in _masks(bits + 2):
        keys = hashes & mask
        order = np.lexsort((brightness, keys))
        keys = keys[order]
        at = np.arange(len(keys))  # places whose neighbour so far apart has the same key: fewer each time
        for apart in range(1, _NEIGHBOURS + 1):
            at = at[: np.searchsorted(at, len(keys) - apart)]
            at = at[keys[at] == keys[at + apart]]
            if not len(at):
                break
            a, b = order[at], order[at + apart]
            close = np.bitwise_count(hashes[a] ^ hashes[b]) <= bits
            close &= np.abs(brightness[a] - brightness[b]) <= _MEAN_LEVELS * COLORS  # follows, and is cheaper
            a, b = a[close], b[close]
            by = np.abs(colors[a].astype(np.int16) - colors[b])
            same = (by.mean(axis=1) <= _MEAN_LEVELS) & (by.max(axis=1, initial=0) <= _MOST_LEVELS)
            yield np.column_stack([a[same], b[same]])


def _folded(hashes: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """One uint64 per picture, equal for equal ones."""
    odd = np.random.default_rng(0).integers(2**63, size=COLORS // 8, dtype=np.uint64) | np.uint64(1)
    parts = np.ascontiguousarray(colors).view(np.uint64)
    return hashes * np.uint64(0x9E3779B97F4A7C15) + ((parts ^ (parts >> np.uint64(29))) * odd).sum(
        axis=1, dtype=np.uint64
    )


def _masks(blocks: int) -> list[np.uint64]:
    """For every two of so many blocks of 64 bits, the bits of both."""
    edges = [64 * block // blocks for block in range(blocks + 1)]
    each = [((1 << b) - 1) ^ ((1 << a) - 1) for a, b in itertools.pairwise(edges)]
    return [np.uint64(a | b) for a, b in itertools.combinations(each, 2)]


def repeats(values: np.ndarray) -> np.ndarray:
    """For each value the index of the first equal one: int64 [n]."""
    _, first, group = np.unique(values, return_index=True, return_inverse=True)
    return first[group.ravel()]
