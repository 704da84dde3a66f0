"""`python -m vlmjax.data.stats shards-*.tar --out=stats.json`: what is in the data, before a run finds out.

Sizes, shapes, formats, lengths of captions, what cannot be read and why, and what is there twice. Every image is
decoded as training decodes it. What is counted:

- `records` were looked at, `of` there are. With --limit they are spread evenly over the source.
- `readable` records were read and all their images decoded; `unreadable` counts the others by reason, the reasons
  that training counts. All figures below are of readable records.
- `exact_duplicates` are the records beyond the first of each group whose images are the same byte for byte.
- `near_duplicates` are records, those left out, that look like an earlier one: at most --bits of 64 bits of a
  perceptual hash differ, and the colours hardly.
- `equal_captions` are captions beyond the first of each group of equal ones; `without_caption` records have none.

About 300 bytes are kept for each record. Ctrl-C stops early and reports what was counted so far.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vlmjax.errors import DataError, UserError

_CHUNK = 32


def walk(source: Any, indices: range, threads: int, tokenizer: Any = None) -> Iterator[Any]:
    """Examine records in threads, a few chunks ahead, and give them in order: tally.One."""
    from vlmjax.data.tally import examine

    def work(part: range) -> list[Any]:
        return [examine(source, i, tokenizer) for i in part]

    parts = (indices[at : at + _CHUNK] for at in range(0, len(indices), _CHUNK))
    pool, running = ThreadPoolExecutor(threads), deque()
    try:
        for part in itertools.islice(parts, 2 * threads):
            running.append(pool.submit(work, part))
        while running:
            yield from running.popleft().result()
            for part in itertools.islice(parts, 1):
                running.append(pool.submit(work, part))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def spread(count: int, limit: int | None) -> range:
    """All of 0..count-1, or `limit` of them an equal step apart."""
    return range(count) if not limit or limit >= count else range(0, count // limit * limit, count // limit)


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[bool]]:
    """A list that is filled by the first Ctrl-C, so that no record is half counted; the second one ends at once."""
    pressed: list[bool] = []

    def note(*_: Any) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def collect(source: Any, options: argparse.Namespace, tokenizer: Any = None) -> dict[str, Any]:
    """Examine the source with a bar on the terminal; Ctrl-C ends it early."""
    from rich.console import Console
    from rich.progress import track

    from vlmjax.data.tally import Tally

    indices, tally = spread(len(source), options.limit), Tally(options.max_length)
    console = Console(stderr=True)
    with _ctrl_c() as pressed:
        ones = walk(source, indices, options.threads, tokenizer)
        quiet = not console.is_terminal
        for one in track(ones, "reading", len(indices), console=console, transient=True, disable=quiet):
            tally.add(one)
            if pressed:
                ones.close()
                break
    stopped = tally.records < len(indices)
    facts = {"data": options.data, "records": tally.records, "of": len(source), "stopped_early": stopped}
    return facts | tally.result(options.bits)


def show(result: dict[str, Any]) -> None:
    """The figures as two tables on the terminal."""
    from rich import box, markup
    from rich.console import Console
    from rich.table import Table

    console = Console(emoji=False)
    part = f"{result['records']:,} of " if result["records"] < result["of"] else ""
    title = f"{part}{result['of']:,} records of {', '.join(result['data'])}"
    if result["stopped_early"]:
        title += " (stopped early)"
    counts = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name, side in (("", "left"), ("records", "right"), ("share", "right"), ("such as", "left")):
        counts.add_column(name, justify=side, overflow="fold")
    for name, count, examples in _rows(result):
        share = f"{count / result['records']:.1%}" if result["records"] else ""
        counts.add_row(name, f"{count:,}", share, markup.escape(", ".join(examples[:2])))
    console.print(counts)
    sizes = Table(box=box.SIMPLE_HEAD)
    for name in ("", "min", "5 %", "median", "95 %", "max", "mean"):
        sizes.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name in _MEASURED:
        if result.get(name):
            sizes.add_row(_MEASURED[name], *(_number(value) for value in result[name].values()))
    if sizes.rows:
        console.print(sizes)


_MEASURED = {
    "width": "width, pixels",
    "height": "height, pixels",
    "aspect": "width / height",
    "bytes": "image, bytes",
    "captions_per_record": "captions per record",
    "caption_words": "caption, words",
    "caption_characters": "caption, characters",
    "caption_tokens": "caption, tokens",
}


def _number(value: float) -> str:
    """At most seven characters."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 100 * size:
            return f"{value / size:,.0f}{letter}"
    if value == int(value) or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, int, list[str]]]:
    yield "readable", result["readable"], []
    for name, count in result["formats"].items():
        yield f"  {name} images", count, []
    for reason, count in result["unreadable"].items():
        yield f"unreadable: {reason}", count, result["unreadable_keys"][reason]
    for kind in ("exact", "near"):
        pairs = result[f"{kind}_duplicate_keys"]
        yield f"{kind} duplicates", result[f"{kind}_duplicates"], [" = ".join(pair) for pair in pairs]
    for name in ("without_image", "without_caption", "captions_too_long", "equal_captions"):
        if result.get(name):
            yield name.replace("_", " "), result[name], []


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    about, _, more = __doc__.partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m vlmjax.data.stats", None, about, more, formatter_class=form)
    parser.add_argument("data", nargs="+", help="shards, tables, folders: what a recipe has as data.train")
    parser.add_argument("--out", metavar="FILE", help="write all figures as json")
    parser.add_argument("--limit", type=_count, metavar="N", help="look at N records, spread evenly")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="count tokens too: a tokenizer's folder or hub id"
    )
    parser.add_argument("--max_length", type=_count, metavar="N", help="count captions of more than N tokens")
    parser.add_argument("--exclude", metavar="REGEX", help="leave out records whose key matches")
    parser.add_argument("--image_column", metavar="NAME", help="of tables with unusual names")
    parser.add_argument("--caption_columns", metavar="NAME,NAME", help="of tables with unusual names")
    parser.add_argument("--image_root", metavar="FOLDER", help="that image paths in tables are relative to")
    parser.add_argument(
        "--bits", type=int, choices=range(9), default=4, help="of 64 that near duplicates may differ in"
    )
    parser.add_argument(
        "--threads", type=_count, default=min(16, os.cpu_count() or 1), metavar="N", help="that decode"
    )
    return parser


def _count(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number from 1 up")
    return number


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Count, show and write what the options ask for."""
    from vlmjax.data import text
    from vlmjax.data.sources import open_source

    if options.max_length and not options.tokenizer:
        raise DataError("--max_length counts tokens: name a --tokenizer")
    if options.out:
        _prepare(options.out)
    tokenizer = text.load(options.tokenizer, 1 << 20) if options.tokenizer else None
    source = open_source(
        options.data,
        exclude=options.exclude,
        image_column=options.image_column,
        caption_columns=options.caption_columns.split(",") if options.caption_columns else None,
        image_root=options.image_root,
    )
    result = collect(source, options, tokenizer)
    show(result)
    if options.out:
        _write(options.out, result)
    return result


def _prepare(path: str) -> None:
    """Find out before hours of reading that a file cannot be written."""
    _write(path, {})


def _write(path: str, result: dict[str, Any]) -> None:
    import fsspec

    try:
        system, target = fsspec.core.url_to_fs(path)
        system.makedirs(system._parent(target), exist_ok=True)
        with system.open(target, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2, ensure_ascii=False)
            file.write("\n")
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"--out={path}: cannot be written ({error}); name a file you may write") from None


def main(arguments: list[str] | None = None) -> None:
    """Run; user errors end as one line and a documented exit code."""
    options = make_parser().parse_args(arguments)
    try:
        result = run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C before anything was counted", file=sys.stderr, flush=True)
        sys.exit(130)
    if options.out:
        print(f"wrote {options.out}")
    if result["stopped_early"]:
        sys.exit(130)


if __name__ == "__main__":
    main()
