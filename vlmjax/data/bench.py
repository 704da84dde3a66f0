"""`python -m vlmjax.data.bench SPEC`: how fast this machine makes training batches of this data, and what it costs."""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

from vlmjax.errors import UserError

_MOST = {"image_size": 4096, "max_length": 100_000, "batch_size": 100_000, "steps": 1_000_000}
SETTLE = 2  # batches before the clock starts: threads, caches and the first decoding are set up


def measure(
    spec: str,
    *,
    tokenizer: str,
    image_size: int = 224,
    max_length: int = 77,
    batch_size: int = 256,
    steps: int = 20,
    threads: int | None = None,
    processes: int = 0,
    crop: float = 0.9,
) -> dict[str, Any]:
    """Make `steps` batches as a training run does, and say what they took.

    Args:
        spec: the data, as in data.train.
        tokenizer: a folder, a hub id, or "bpe:N" to learn one of N tokens from these captions first.
        image_size, max_length: pixels of a side, tokens of a text.
        batch_size, steps: what is measured.
        threads, processes: as data.threads and data.processes.
        crop: random crops keep at least this share of an image.

    Returns:
        images_per_second, cpu_ms_per_image (without processes), decode_ms (time of the decoding threads
        per image), megabytes_per_second (read, encoded), first_batch_seconds, resident_megabytes (peak, of this
        process), skipped (by reason), backend (what decodes and resizes).
    """
    from vlmjax.data import images
    from vlmjax.data.augment import TrainTransform
    from vlmjax.data.pipeline import TrainData
    from vlmjax.data.recipe import open_tokenizer
    from vlmjax.data.sources import open_source

    source = open_source(spec)
    words = open_tokenizer(tokenizer, source, max_length)
    transform = TrainTransform(image_size, {"crop_scale": (crop, 1.0)})
    options = {"threads": threads, "processes": processes, "max_bad_share": 1.0}
    begin = time.perf_counter()
    data = TrainData(source, transform, words, batch_size=min(batch_size, len(source)), **options)
    next(data)
    first = time.perf_counter() - begin
    for _ in range(SETTLE):
        next(data)
    data.work()
    begin, cpu = time.perf_counter(), _cpu()
    for _ in range(steps):
        next(data)
    seconds, cpu, work = time.perf_counter() - begin, _cpu() - cpu, data.work()
    data.close()  # workers are waited for: only then their time counts
    cpu = cpu if not processes else None
    count = steps * data.batch_size
    return {
        "images_per_second": count / seconds,
        "cpu_ms_per_image": None if cpu is None else 1000 * cpu / count,
        "decode_ms": 1000 * work["seconds"] / count,
        "megabytes_per_second": work["bytes"] / 1e6 / seconds,
        "first_batch_seconds": first,
        "resident_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MAXRSS_UNIT,
        "skipped": dict(data.skips.by_reason),
        "backend": images.backend(),
    }


_MAXRSS_UNIT = 1024 if sys.platform == "linux" else 1 << 20  # kilobytes on Linux, bytes on macOS


def _cpu() -> float:
    times = os.times()
    return times.user + times.system


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vlmjax.data.bench", description="Time the input pipeline."
    )
    parser.add_argument("spec", help="what to read, as in data.train: shards, a table, a folder, scenes")
    parser.add_argument(
        "--tokenizer", default="bpe:1024", help="folder, hub id or bpe:N (default: %(default)s)"
    )
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--max_length", type=int, default=77, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, help="default: one per core")
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument(
        "--crop", type=float, default=0.9, help="smallest share of a crop (default: %(default)s)"
    )
    parser.add_argument("--out", help="also write the figures to this json file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _parser()
    given = vars(parser.parse_args(argv))
    out = given.pop("out")
    for name in ("image_size", "max_length", "batch_size", "steps"):
        if not 1 <= given[name] <= _MOST[name]:
            parser.error(f"--{name}={given[name]}: expected 1 to {_MOST[name]}")
    for name in ("threads", "processes"):
        if given[name] is not None and not 0 <= given[name] <= 256:
            parser.error(f"--{name}={given[name]}: expected 0 to 256")
    if not 0 < given["crop"] <= 1:
        parser.error(f"--crop={given['crop']}: expected above 0, at most 1")
    if out and not os.path.isdir(os.path.dirname(os.path.abspath(out))):
        parser.error(f"--out={out}: its folder does not exist")
    try:
        row = measure(**given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name, value in row.items():
        if value is not None:
            print(f"{name:<22}{value:.3g}" if isinstance(value, float) else f"{name:<22}{value}")
    if out:
        with open(out, "w") as file:
            json.dump(row, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
