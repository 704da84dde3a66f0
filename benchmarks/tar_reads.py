"""CPU time of reading webdataset shards: vlmjax at random through its index, against the webdataset package in order.

`python benchmarks/tar_reads.py --out=tar_reads.json` makes shards of random bytes sized as photographs are; --shards
measures yours. Both readers get the same shards, in turn, one thread each; image and caption bytes, nothing decoded.
"""

import argparse
import glob
import io
import json
import os
import platform
import resource
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np

# A JPEG's start, APP0 and baseline frame header of 500x375 pixels: all that an index looks at.
JPEG_HEAD = bytes.fromhex("ffd8ffe000104a46494600010100000100010000ffc0001108017701f403012200021101031101")


# What img2dataset writes beside a picture.
ABOUT = {"url": "https://example.com/pictures/0123456789.jpg", "status": "success", "error_message": None}
ABOUT |= {"width": 500, "height": 375, "original_width": 1000, "original_height": 750, "sha256": "0" * 64}


def make_shards(folder: Path, shards: int = 4, samples: int = 1024, mean_bytes: int = 61_000) -> list[str]:
    """Tars as img2dataset writes them: key.jpg, key.txt, key.json, the sizes of the images log-normal."""
    rng, paths = np.random.default_rng(0), []
    for shard in range(shards):
        path = folder / f"{shard:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(samples):
                key = f"{shard:05d}{i:04d}"
                size = int(mean_bytes * rng.lognormal(-0.08, 0.4))
                caption = " ".join(rng.choice(["a", "photo", "of", "some", "thing"], 13))
                members = {
                    "jpg": JPEG_HEAD + rng.bytes(size),
                    "txt": caption.encode(),
                    "json": json.dumps(ABOUT | {"caption": caption, "key": key}).encode(),
                }
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        paths.append(str(path))
    return paths


def cpu_seconds(work: Callable[[], int]) -> tuple[float, int]:
    """CPU seconds of this process, user and system, and what `work` returned."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    result = work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


def read_webdataset(paths: list[str]) -> int:
    """All samples in the order of the shards; returns how many."""
    import webdataset

    count = 0
    for sample in webdataset.WebDataset(paths, shardshuffle=False):
        count += bool(sample["jpg"]) and bool(sample["txt"])
    return count


def read_vlmjax(source: object, order: np.ndarray) -> int:
    """All samples in a random order; returns how many."""
    count = 0
    for i in order.tolist():
        record = source[i]
        count += bool(record.image) and bool(record.captions)
    return count


def measure(paths: list[str], rounds: int, cache: str) -> dict:
    """Microseconds of CPU per sample, medians of interleaved rounds, and the time that indexing takes."""
    from vlmjax.data.formats import tar
    from vlmjax.data.formats.webdataset import TarSource

    build = statistics.median(
        cpu_seconds(lambda: sum(tar.index(path).count for path in paths))[0] for _ in range(3)
    )
    TarSource(paths, cache=cache)
    begin = time.perf_counter()
    source = TarSource(paths, cache=cache)
    opening = time.perf_counter() - begin
    orders = [np.random.default_rng(seed).permutation(len(source)) for seed in range(rounds + 1)]
    times: dict[str, list[float]] = {"webdataset": [], "vlmjax": []}
    for order in orders:  # the first round warms caches and is left out
        times["webdataset"].append(cpu_seconds(lambda: read_webdataset(paths))[0])
        times["vlmjax"].append(cpu_seconds(lambda o=order: read_vlmjax(source, o))[0])
    each = {name: statistics.median(spent[1:]) / len(source) * 1e6 for name, spent in times.items()}
    return {
        "samples": len(source),
        "webdataset_sequential_us": each["webdataset"],
        "vlmjax_random_us": each["vlmjax"],
        "ratio": each["vlmjax"] / each["webdataset"],
        "index_build_us": build / len(source) * 1e6,
        "open_with_index_seconds": opening,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shards", help="a glob of tars with jpg and txt members (default: made for the purpose)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="write the figures there as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(glob.glob(arguments.shards)) if arguments.shards else make_shards(Path(folder))
        figures = measure(paths, arguments.rounds, os.path.join(folder, "cache"))
    figures |= {"webdataset": metadata.version("webdataset"), "python": platform.python_version()}
    print(json.dumps(figures, indent=2))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
