"""`python -m vlmjax.capfilt STEP SPEC --out=FOLDER`: better captions for web images (BLIP, 2201.12086, section 3.3).

    caption  SPEC --out=DIR --model=CAPTIONER    write captions beside those that images have
    filter   SPEC --out=DIR --model=FILTER       keep the captions that match their image
    rank     SPEC --out=DIR --model=CLIP         keep the captions most alike to their image (BLIP-2)
    merge    SPEC,SPEC,... --out=DIR             several sources as one set of shards, human captions for one
    report   SPEC --out=DIR                      what a filter did, as a page; SPEC is what it filtered

Shards come out, which every recipe reads as data.train. Started again, a step goes on where it was. Several processes
share the work with --process=0 --processes=4: each makes shards of its own, whatever becomes of the others.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmjax.capfilt.shards import Notes, Outcome, Shards
from vlmjax.command_line import Parser, ended
from vlmjax.data.sources import Source, open_source, open_sources, together
from vlmjax.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    about, _, more = __doc__.partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m vlmjax.capfilt", None, about, more, formatter_class=form, allow_abbrev=False)
    steps = parser.add_subparsers(dest="step", required=True, parser_class=Parser)
    for name in ("caption", "filter", "rank", "merge", "report"):
        add = steps.add_parser(name, allow_abbrev=False).add_argument
        add("spec", metavar="SPEC", help="what is read, as data.train of a recipe names it")
        add("--out", metavar="DIR", required=True, help="folder of the shards, local or remote")
        if name == "report":
            add("--html", metavar="FILE", default="", help="the page (DIR/report.html)")
            continue
        add("--records", type=int, default=1000, metavar="N", help="of a shard (1000)")
        add("--limit", type=int, default=0, metavar="N", help="the first N records (all)")
        add("--process", type=int, default=0, metavar="I", help="number of this process, from 0")
        add("--processes", type=int, default=1, metavar="N", help="that share the work")
        if name == "merge":
            continue
        add("--model", metavar="FOLDER", required=True, help="a run, or a Hugging Face folder or id")
        add("--batch_size", type=int, default=64, metavar="N", help="over all devices (64)")
        if name == "caption":
            add("--prompt", default="a picture of ", help="what captions begin with (%(default)r)")
            add("--number", type=int, default=1, metavar="N", help="captions of an image (1; BLIP-2 has 10)")
            add("--top_p", type=float, default=0.9, metavar="P", help="of nucleus sampling (0.9)")
            add("--num_beams", type=int, default=1, metavar="N", help="beams in place of sampling")
            add("--min_new_tokens", type=int, default=1, metavar="N", help="of a caption (1)")
            add(
                "--max_new_tokens",
                type=int,
                default=16,
                metavar="N",
                help="of a caption, prompt not counted (16)",
            )
            add("--seed", type=int, default=0, help="of what is drawn, with the record's key (0)")
        if name == "filter":
            add(
                "--threshold",
                type=float,
                default=0.5,
                metavar="P",
                help="probability of a match to be kept (0.5)",
            )
            add(
                "--least_cosine", type=float, default=-1.0, metavar="C", help="and the least cosine (-1: any)"
            )
        if name == "rank":
            add("--keep", type=int, default=2, metavar="N", help="captions of an image that stay (2)")
    return parser


def run(options: argparse.Namespace) -> dict[str, int]:
    """Do what the command line says; the counts of what is done by now. Raises UserError."""
    _check(options)
    if options.step == "report":
        return _report(options)
    many = options.step == "merge"
    source = together(open_sources(options.spec)) if many else open_source(options.spec)
    work, said = _work(options)
    shards = Shards(source, options.out, options.records, {"step": options.step, **said}, options.limit)
    counts = shards.run(work, options.process, options.processes)
    for name, number in sorted(counts.items()):
        print(f"{number:>8}  {name}")
    if not shards.complete():
        print("          shards of other processes are still missing")
    elif options.step in ("filter", "rank"):
        _write_page(options.out, source, "")
    return counts


def _work(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """What is done with the records of a shard, and all that decides it."""
    if options.step == "merge":
        return (lambda records: (Outcome(record) for record in records)), {}
    from vlmjax.capfilt import steps
    from vlmjax.capfilt.models import Captioner, Scorer

    names = {
        "caption": ("prompt", "number", "top_p", "num_beams", "min_new_tokens", "max_new_tokens", "seed"),
        "filter": ("threshold", "least_cosine"),
        "rank": ("keep",),
    }[options.step]
    said = {name: getattr(options, name) for name in names}
    named = {"model": options.model, **said}
    if options.step == "caption":
        captioner = Captioner(options.model, batch_size=options.batch_size, **said)
        return (lambda records: steps.caption(captioner, records)), named
    scorer = Scorer(options.model, matching=options.step == "filter", batch_size=options.batch_size)
    if options.step == "filter":
        return (lambda records: steps.filter_captions(scorer, records, **said)), named
    return (lambda records: steps.rank(scorer, records, **said)), named


def _check(options: argparse.Namespace) -> None:
    at_least = {"records": 1, "limit": 0, "processes": 1, "batch_size": 1, "number": 1, "num_beams": 1, "keep": 1,
                "min_new_tokens": 0, "max_new_tokens": 1}  # fmt: skip
    for name, least in at_least.items():
        if getattr(options, name, least) < least:
            raise UserError(f"--{name}={getattr(options, name)}: expected at least {least}")
    if options.step != "report" and not 0 <= options.process < options.processes:
        raise UserError(f"--process={options.process}: expected 0 to {options.processes - 1} (--processes)")
    for name, low in (("threshold", 0.0), ("top_p", 1e-6), ("least_cosine", -1.0)):
        if not low <= getattr(options, name, 1.0) <= 1.0:
            raise UserError(f"--{name}={getattr(options, name)}: expected {low:g} to 1")


def _report(options: argparse.Namespace) -> dict[str, int]:
    _write_page(options.out, open_source(options.spec), options.html)
    return {}


def _write_page(out: str, source: Source, path: str) -> None:
    from vlmjax.capfilt import report

    notes = Notes(out)
    found = report.told(notes)
    if not found.counts:
        raise UserError(f"--out={out}: holds no run of filter or rank, which alone have scores to show")
    for origin, own in found.counts.items():
        print(
            f"{origin:>10}  {own['kept']:,} of {own['captions']:,} captions kept ({own['kept'] / own['captions']:.1%})"
        )
    path = path or ("" if "://" in out else os.path.join(out, "report.html"))
    if path:
        try:
            Path(path).write_text(report.page(found, notes, source, f"CapFilt: {out}"), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--html={path}: cannot be written ({error.strerror})") from None
        print(f"report      {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run; user errors end as one line."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    ended(lambda: run(make_parser().parse_args(arguments)))


if __name__ == "__main__":
    main()
