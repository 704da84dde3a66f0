"""`python -m vlmjax.evals.caption REFERENCES.json RESULTS.json`: score captions as COCO does, without Java.

  REFERENCES.json  {"annotations": [{"image_id": 1, "caption": "a dog"}, ...]}, several captions of an image or one
  RESULTS.json     [{"image_id": 1, "caption": "a dog runs"}, ...], one caption of each of these images

bleu (1 to 4), rouge (L) and cider (D) are computed here. meteor and spice need a Java runtime and the jar files of
their authors; the environment variable VLMJAX_CAPTION_JARS names the folder that holds them (meteor/, spice/).
"""

import argparse
import json
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlmjax.command_line import Parser, ended
from vlmjax.errors import DataError, UserError
from vlmjax.evals import caption_java, caption_metrics, ptb
from vlmjax.evals.caption_files import read_references, read_results
from vlmjax.evals.caption_metrics import Metric

METRICS = ("bleu", "rouge", "cider", "meteor", "spice")
DEFAULT = METRICS[:3]


class Scores(NamedTuple):
    """What captions are worth.

    Attributes:
        whole: of all captions, by name: `Bleu_1` to `Bleu_4`, `ROUGE_L`, `METEOR` and `SPICE` from 0 to 1, `CIDEr`
            from 0 to 10 (papers print 100 times all of them; for CIDEr that is 0 to 1000).
        each: of every image, by the same names.
    """

    whole: dict[str, float]
    each: dict[Hashable, dict[str, float]]


def score(
    references: Mapping[Hashable, Sequence[str]],
    captions: Mapping[Hashable, str],
    metrics: Sequence[str] = DEFAULT,
    **options: Any,
) -> dict[str, float]:
    """The scores of all captions together: `score_each(...).whole`."""
    return score_each(references, captions, metrics, **options).whole


def score_each(
    references: Mapping[Hashable, Sequence[str]],
    captions: Mapping[Hashable, str],
    metrics: Sequence[str] = DEFAULT,
    *,
    tokenize: Callable[[str], str] = ptb.tokenize,
    jars: str | os.PathLike | None = None,
) -> Scores:
    """Score captions of images against what people wrote (Chen et al. 2015, "Microsoft COCO Captions", section 3).

    Args:
        references: captions of each image; images without an entry in `captions` may not be among them, because they
            would change what is common and with it CIDEr.
        captions: one of each image.
        metrics: of bleu, rouge, cider, meteor, spice.
        tokenize: from a caption to its tokens with spaces between them; COCO's own way by default. Scores with another
            one are not comparable with published ones. SPICE is given the tokens too, as in COCO's code.
        jars: the folder of METEOR's and SPICE's programs instead of VLMJAX_CAPTION_JARS.

    Raises:
        DataError: images of the one that the other lacks, or none at all, or an image without references.
        UserError: a metric that does not exist, or whose program is missing.
    """
    check_metrics(metrics, jars)
    _check_images(references, captions)
    images = list(captions)
    own = [[tokenize(text) for text in references[image]] for image in images]
    written = [tokenize(captions[image]) for image in images]
    found: dict[str, Metric] = {}
    for metric in metrics:
        if metric == "bleu":
            found |= {f"Bleu_{n}": part for n, part in enumerate(caption_metrics.bleu(own, written), 1)}
        elif metric == "rouge":
            found["ROUGE_L"] = caption_metrics.rouge(own, written)
        elif metric == "cider":
            found["CIDEr"] = caption_metrics.cider(own, written)
        elif metric == "meteor":
            found["METEOR"] = caption_java.meteor(own, written, jars)
        else:
            found["SPICE"] = caption_java.spice(own, written, jars)
    each = {image: {name: part.each[row] for name, part in found.items()} for row, image in enumerate(images)}
    return Scores({name: part.whole for name, part in found.items()}, each)


def check_metrics(metrics: Sequence[str], jars: str | os.PathLike | None = None) -> None:
    """Raise UserError for a metric that does not exist or whose program is missing."""
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics or isinstance(metrics, str):
        named = metrics if isinstance(metrics, str) else ",".join(metrics)
        raise UserError(f"metrics {named!r}: expected some of {', '.join(METRICS)}")
    for metric, files in (("meteor", caption_java.METEOR), ("spice", caption_java.SPICE)):
        if metric in metrics:
            caption_java.find(metric.upper(), files, jars)


def _check_images(references: Mapping, captions: Mapping) -> None:
    if not captions:
        raise DataError("no captions to score: expected one for each image")
    for have, lack, what in (
        (captions, references, "captions of images without references"),
        (references, captions, "references of images without a caption"),
    ):
        missing = [image for image in have if image not in lack]
        if missing:
            few = ", ".join(map(repr, missing[:3])) + (", ..." if len(missing) > 3 else "")
            raise DataError(f"{len(missing)} of {len(have)} {what} ({few}): both must be of the same images")
    for image, texts in references.items():
        if isinstance(texts, str) or not texts:
            raise DataError(f"image {image!r}: its references are {texts!r}, expected a list of captions")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m vlmjax.evals.caption", description=__doc__, formatter_class=form)
    parser.add_argument("references", metavar="REFERENCES.json")
    parser.add_argument("results", metavar="RESULTS.json")
    parser.add_argument(
        "--metrics", default=",".join(DEFAULT), help=f"of {','.join(METRICS)} (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the scores, and those of each image, there")
    parser.add_argument(
        "--only_results",
        action="store_true",
        help="leave out references of images without a result (CIDEr is another then)",
    )
    return parser


def run(options: Any, console: Any = None) -> None:
    """Do what the command line says."""
    metrics = options.metrics.split(",")
    check_metrics(metrics)
    references, captions = read_references(options.references), read_results(options.results)
    if options.only_results:
        references = {image: texts for image, texts in references.items() if image in captions}
    scores = score_each(references, captions, metrics)
    _print(scores, console)
    if options.json:
        each = [{"image_id": image, **own} for image, own in scores.each.items()]
        try:
            Path(options.json).write_text(
                json.dumps({"scores": scores.whole, "images": each}, indent=1) + "\n"
            )
        except OSError as error:
            raise UserError(f"--json={options.json}: cannot be written: {error.strerror}") from None


def _print(scores: Scores, console: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Captions", caption=f"images: {len(scores.each):,}", title_justify="left")
    table.add_column("metric")
    table.add_column("× 100", justify="right")
    for name, value in scores.whole.items():
        table.add_row(name.replace("Bleu_", "BLEU-").replace("_", "-"), f"{100 * value:.1f}")
    (console or Console()).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run; user errors end as one line."""
    ended(lambda: run(make_parser().parse_args(arguments)))


if __name__ == "__main__":
    main()
