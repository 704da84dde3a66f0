"""`python -m vlmjax.data.index SHARDS...`: read the headers of shards once and keep what they say beside them."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vlmjax.errors import DataError


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(
        "python -m vlmjax.data.index",
        description="Index tar, TFRecord and ArrayRecord shards: offsets, sizes, keys, width and height of images. "
        "A source makes missing indexes itself when it first opens a shard; made beforehand, and copied with the "
        "shards (to a bucket too), they let every machine start at once.",
    )
    parser.add_argument(
        "shards", nargs="+", help="paths; braces {000..123}, globs and folders are understood"
    )
    parser.add_argument(
        "--cache", default=None, metavar="DIR", help="write there, not beside the shards (read-only)"
    )
    parser.add_argument(
        "--threads", type=_positive, default=None, metavar="N", help="shards at a time (default: 8)"
    )
    parser.add_argument("--force", action="store_true", help="read shards again whose index is in place")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="also count the tokens of captions: as data.tokenizer"
    )
    arguments = parser.parse_args(argv)
    try:
        return run(arguments)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; what is done is kept", file=sys.stderr)
        return 130


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def run(arguments: Any) -> int:
    """Index every shard; one that cannot be read is told of and makes the exit status 1."""
    from vlmjax.data.formats import kinds
    from vlmjax.data.storage import files

    paths = [path for pattern in arguments.shards for path in kinds.shards_in(files.find(pattern))]
    if not paths:
        raise DataError(f"no shards in {' '.join(arguments.shards)}")
    failed = 0
    with ThreadPoolExecutor(arguments.threads or 8) as pool:
        jobs = [(path, pool.submit(_one, path, arguments.cache, arguments.force)) for path in paths]
        for path, job in jobs:
            try:
                print(f"{path}: {job.result()}", flush=True)
            except DataError as error:
                failed += 1
                print(f"{path}: failed: {error}", file=sys.stderr, flush=True)
    if arguments.tokenizer and failed < len(paths):
        _count_tokens(arguments.tokenizer, paths, arguments.cache)
    return 1 if failed else 0


def _one(path: str, cache: str | None, force: bool) -> str:
    """Index one shard, or see that it is indexed; the line to print."""
    from vlmjax.data.formats import kinds
    from vlmjax.data.storage import files, shard_index
    from vlmjax.data.storage.shards import Shards

    begin = time.perf_counter()
    shards, build = Shards([path], cache), kinds.builder(path)
    far = files.is_remote(path)
    place = shards.index_place(0) if cache or far else path + shard_index.ENDING
    with shards.held(0) as local:
        found = (
            None
            if force
            else shard_index.find([place], lambda index: index.fits(local), None if far else path)
        )
        done = "already indexed" if found else "indexed"
        if found is None:
            found = shard_index.make(local, place, build)
    if not found.path:
        raise DataError(f"cannot write {place}: name another folder with --cache")
    spent = time.perf_counter() - begin
    told = "".join(f"; {note}" for note in found.notes)
    return f"{done}, {found.count:,} samples, {os.path.getsize(found.path):,} bytes, {spent:.2f} s{told}"


def _count_tokens(name: str, paths: Sequence[str], cache: str | None) -> None:
    import numpy as np

    from vlmjax.data import text
    from vlmjax.data.formats import kinds

    tokenizer = text.load(name, 1 << 20)
    for path in paths:
        source = kinds.open_shards([path], cache=cache)
        lengths = token_lengths(source, lambda caption: len(tokenizer.encode(caption)))
        source.add_column(f"tokens:{name}", np.array(lengths, np.int64))
        print(f"{path}: captions have up to {max(lengths)} tokens of {name}", flush=True)


def token_lengths(source: Any, count: Callable[[str], int]) -> list[int]:
    """Tokens of the longest caption of each example, 0 for those that cannot be read or have none."""
    from vlmjax.data.sources import captions_of
    from vlmjax.errors import BadRecord

    out = []
    for i in range(len(source)):
        try:
            out.append(max((count(caption) for caption in captions_of(source, i)), default=0))
        except BadRecord:  # it is skipped and counted when training comes to it
            out.append(0)
    return out


if __name__ == "__main__":
    sys.exit(main())
