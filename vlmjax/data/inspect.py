"""`python -m vlmjax.data.inspect shards-*.tar --out=page.html`: the examples of one step, as the train step sees them.

Order, caption, crop, colours and tokens come from the pipeline of training itself, so with a run's data, seed, batch
size, image size, augmentation and tokenizer the page shows that run's rows. Only the rows shown are read.
"""

import argparse
import ast
import logging
import sys
import tempfile
from typing import Any

from vlmjax.errors import DataError, UserError


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    about, _, more = __doc__.partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m vlmjax.data.inspect", None, about, more, formatter_class=form)
    add = parser.add_argument
    add("data", nargs="+", help="shards, tables, folders, scenes: what a recipe has as data.train")
    add("--out", metavar="FILE", help="write a page with the pictures (html, nothing beside it is needed)")
    add("--show", type=_count, default=16, metavar="N", help="rows, from the first of the batch (16)")
    add("--step", type=_step, default=0, metavar="N", help="of training (0)")
    add("--seed", type=int, default=0, metavar="N", help="of order, captions and augmentation (0)")
    add(
        "--batch-size",
        type=_count,
        default=256,
        metavar="N",
        help="of the global batch (256, or all there is)",
    )
    add("--image-size", type=_count, default=224, metavar="N", help="pixels of a side (224)")
    add(
        "--tokenizer",
        default="bpe:1000",
        metavar="NAME",
        help="folder or hub id; bpe:N learns one from the data (bpe:1000)",
    )
    add("--max-length", type=_count, default=77, metavar="N", help="tokens of a text (77)")
    add(
        "--augment",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="flip=0.5, 'crop_scale=(0.4, 1.0)', 'policy=randaugment(2, 9)'; see vlmjax/data/augment.py",
    )
    add(
        "--captions",
        default="random",
        metavar="RULE",
        help="which of several: random, first, all, weights:3,1",
    )
    add("--mix", default="size", metavar="RULE", help="of several sources: size, sqrt or equal")
    add("--exclude", metavar="REGEX", help="leave out records whose key matches")
    return parser


def _count(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number from 1 up")
    return number


def _step(value: str) -> int:
    number = int(value)
    if not 0 <= number < 2**40:
        raise argparse.ArgumentTypeError(f"{value} is not a number from 0 up")
    return number


def augmentation(settings: list[str]) -> dict[str, Any]:
    """`["flip=0.5"]` as the dictionary of a recipe. Raises DataError."""
    out = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise DataError(f"--augment={setting} is not name=value, such as flip=0.5")
        try:
            out[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[name.strip()] = value  # a policy is a string
    return out


def make_tokenizer(name: str, source: Any, max_length: int) -> Any:
    """What a recipe's data.tokenizer names; "bpe:N" is learned from up to 20,000 captions, as training does."""
    from vlmjax.data import bpe, text
    from vlmjax.data.sources import captions_of
    from vlmjax.errors import BadRecord

    if not name.startswith("bpe:"):
        return text.load(name, max_length)
    if not name[4:].isdigit() or int(name[4:]) < 514:
        raise DataError(f"--tokenizer={name}: a number from 514 up stands behind bpe:")

    def captions() -> Any:
        for i in range(0, len(source), max(1, len(source) // 20_000)):
            try:
                yield from captions_of(source, i)
            except BadRecord:  # the batch will tell
                continue

    with tempfile.TemporaryDirectory() as folder:
        bpe.train_bpe(captions(), int(name[4:]), folder)
        return text.load(folder, max_length)


def run(options: argparse.Namespace) -> int:
    """Make the batch, print it, write the page. Returns how many of the rows cannot be used."""
    from vlmjax.data import augment, mixture, page, pipeline
    from vlmjax.data.sources import open_sources, together

    transform = augment.TrainTransform(options.image_size, augmentation(options.augment))
    sources = open_sources(
        options.data, seed=options.seed, image_size=options.image_size, exclude=options.exclude
    )
    source = together(sources)
    tokenizer = make_tokenizer(options.tokenizer, source, options.max_length)
    batch_size = min(options.batch_size, len(source))
    data = pipeline.TrainData(
        sources,
        transform,
        tokenizer,
        batch_size=batch_size,
        shares=mixture.shares([len(one) for one in sources], options.mix),
        rows=range(min(options.show, batch_size)),
        seed=options.seed,
        start_step=options.step,
        threads=0,
        max_bad_share=1.0,
        captions=options.captions,
    )
    batch = next(data)
    data.close()
    rows = page.explain(batch, source, data.indices(options.step), tokenizer)
    facts = {
        "data": source.name,
        "records": f"{len(source):,}",
        "step": options.step,
        "seed": options.seed,
        "batch size": batch_size,
        "tokenizer": options.tokenizer,
        "captions": options.captions,
        "augmentation": ", ".join(options.augment) or "the defaults of vlmjax/data/augment.py",
    }
    page.show(rows, batch, facts)
    if options.out:
        try:
            with open(options.out, "w", encoding="utf-8") as file:
                file.write(page.html_of(rows, batch, facts))
        except OSError as error:
            raise DataError(f"--out={options.out}: cannot be written ({error.strerror})") from None
        print(f"wrote {options.out}")
    return sum(not row.valid for row in rows)


def main(arguments: list[str] | None = None) -> None:
    """Run; user errors end as one line and a documented exit code."""
    options = make_parser().parse_args(arguments)
    skips = logging.getLogger("vlmjax.data.loader")
    before = skips.level
    skips.setLevel(logging.ERROR)  # the rows say what was skipped
    try:
        run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        sys.exit(130)
    finally:
        skips.setLevel(before)


if __name__ == "__main__":
    main()
