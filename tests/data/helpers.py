"""Small shards, images and a tokenizer made on the spot for the tests of the data room."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from vlmjax.data import bpe, text
from vlmjax.data.record import Record
from vlmjax.errors import BadRecord

WORDS = "red green blue round square star above below two three small large".split()


def picture(seed: int, height: int = 40, width: int = 48, channels: int = 3) -> np.ndarray:
    """Smooth random pixels: uint8 [height, width, channels]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, channels)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    """An image file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def caption(seed: int) -> str:
    """Four words."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, 4))


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w", fmt: int = tarfile.GNU_FORMAT) -> Path:
    """A tar with these files in this order."""
    with tarfile.open(path, mode, format=fmt) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard(path: Path, first: int, count: int, mode: str = "w") -> Path:
    """An img2dataset-like shard of examples first..first+count."""
    members = {}
    for i in range(first, first + count):
        members[f"{i:06d}.png"] = encoded(picture(i))
        members[f"{i:06d}.txt"] = caption(i).encode()
        members[f"{i:06d}.json"] = json.dumps({"caption": caption(i), "width": 48}).encode()
    return write_tar(path, members, mode)


def tokenizer(folder: Path, length: int = 8) -> text.Tokenizer:
    """A small tokenizer of the words above."""
    bpe.train_bpe([caption(i) for i in range(50)], 560, folder)
    return text.load(folder, length)


class Memory:
    """A source of records held in memory; entries that are errors are raised."""

    def __init__(self, entries: list):
        """`entries` are records or BadRecord errors."""
        self.entries, self.name, self.fingerprint = entries, "memory", f"memory{len(entries)}"

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.entries)

    def key(self, i: int) -> str:
        """The key of entry i."""
        return self.entries[i].key

    def __getitem__(self, i: int) -> Record:
        """Entry i."""
        if isinstance(self.entries[i], BadRecord):
            raise self.entries[i]
        return self.entries[i]


def memory(count: int, captions: int = 1) -> Memory:
    """Encoded pictures with so many captions each."""
    texts = [tuple(f"{caption(i)} {WORDS[c]}" for c in range(captions)) for i in range(count)]
    return Memory([Record(f"k{i}", encoded(picture(i, 20, 24)), texts[i]) for i in range(count)])
