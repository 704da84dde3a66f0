"""Ways in which files are damaged, for tests of checkpoints."""

from pathlib import Path

import numpy as np


def files(step: Path) -> list[Path]:
    """Every file of a checkpoint, the same order each time."""
    return sorted(path for path in step.rglob("*") if path.is_file())


def delete(path: Path) -> None:
    path.unlink()


def truncate(share: float):
    """Keeps this share of a file."""

    def cut(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])

    cut.__name__ = f"truncate to {share}"
    return cut


def flip(place: float, bit: int = 0x10):
    """Changes one byte, at this share of the length."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[min(int(place * len(data)), len(data) - 1)] ^= bit
        path.write_bytes(bytes(data))

    change.__name__ = f"flip at {place:.2f}"
    return change


def ways(flips: int, seed: int = 0) -> list:
    """Delete, truncate, and flips at random places."""
    rng = np.random.default_rng(seed)
    bits = [flip(rng.random(), 1 << int(rng.integers(8))) for _ in range(flips)]
    return [delete, truncate(0.0), truncate(0.6), *bits]
