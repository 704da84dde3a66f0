"""`python -m vlmjax.data.inspect --config=configs/x.py --out=page.html`: examples of one step, as the step sees them.

Sources, mixture, order, captions, templates, crops, colours and tokens come from the recipe through the pipeline of
training itself, so with a run's own --config and --config.key=value the page shows that run's rows. Without --config
the recipe is vlmjax/config.py's defaults with the tokenizer bpe:1000. Only the rows shown are read. Rows of
conversations (stage "generative") are printed with what the model learns to write between { and }.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from vlmjax.errors import DataError, RecipeError, UserError


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    about, _, more = __doc__.partition("\n\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m vlmjax.data.inspect", None, about, more, formatter_class=form, allow_abbrev=False
    )
    add = parser.add_argument
    add("data", nargs="*", help="instead of the recipe's data.train: shards, tables, folders, scenes")
    add(
        "--config",
        metavar="FILE",
        help="recipe, e.g. configs/clip_vitl.py:tiny; --config.key=value sets its keys",
    )
    add("--out", metavar="FILE", help="write a page with the pictures (html, nothing beside it is needed)")
    add("--show", type=_count, default=16, metavar="N", help="rows, from the first of the batch (16)")
    add("--step", type=_step, default=0, metavar="N", help="of training (0)")
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


def _default() -> Any:
    from vlmjax import config

    recipe = config.recipe()
    recipe.total, recipe.data.tokenizer = config.duration(steps=1), "bpe:1000"
    return recipe


def read_recipe(options: argparse.Namespace, keys: Sequence[str]) -> Any:
    """The recipe that the command line means. Raises RecipeError."""
    from vlmjax import command_line

    given = [f"--config={options.config}"] if options.config else []
    data = [f"--config.data.train={','.join(map(str, options.data))}"] if options.data else []
    return command_line.read([*given, *keys, *data], _default)


def run(options: argparse.Namespace, keys: Sequence[str] = ()) -> int:
    """Make the batch, print it, write the page. Returns how many of the rows cannot be used."""
    recipe = read_recipe(options, keys)
    from vlmjax.data import page, page_talk
    from vlmjax.data.recipe import (
        generative_rows,
        naming,
        open_tokenizer,
        open_train_sources,
        special_tokens,
        tokenizer_name,
        train_data,
    )
    from vlmjax.data.sources import together

    if recipe.stage == "classification":
        raise RecipeError("rows of a labelled set are not shown: give --data without its recipe")
    sources, shares = open_train_sources(recipe)
    source, name = together(sources), tokenizer_name(recipe)
    with naming("data.tokenizer"):
        tokenizer = open_tokenizer(name, source, recipe.model.text.max_length, special_tokens(recipe))
    batch_size = recipe.batch_size if options.config else min(recipe.batch_size, len(source))
    data = train_data(
        recipe,
        sources,
        shares,
        tokenizer,
        recipe.model.image.image_size,
        batch_size=batch_size,
        rows=range(min(options.show, batch_size)),
        start_step=options.step,
        threads=0,
        processes=0,
        max_bad_share=1.0,
    )
    batch = next(data)
    data.close()
    if recipe.stage == "generative":
        if options.out:
            raise RecipeError("--out: pages are of pairs; rows of conversations are shown on the terminal")
        size = generative_rows(recipe, tokenizer, recipe.model.image.image_size).image_tokens
        print("\n".join(page_talk.lines_of(batch, tokenizer, size)))
        return int((~batch["valid"]).sum())
    rows = page.explain(batch, data, options.step, tokenizer)
    facts = {
        "recipe": options.config or "the defaults of vlmjax/config.py",
        "keys": " ".join(keys) or "as they are",
        "data": source.name,
        "records": f"{len(source):,}",
        "step": options.step,
        "seed": recipe.seed,
        "batch size": batch_size,
        "tokenizer": name,
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
    given = sys.argv[1:] if arguments is None else arguments
    # Apart, since argparse takes what has a space in it for no option.
    keys = [argument for argument in given if argument.startswith("--config.")]
    options = make_parser().parse_args([argument for argument in given if argument not in keys])
    skips = logging.getLogger("vlmjax.data.loader")
    before = skips.level
    skips.setLevel(logging.ERROR)  # the rows say what was skipped
    try:
        run(options, keys)
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
