"""What to measure and what came out: the two ends of every evaluation."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmjax.config_checks import METRICS
from vlmjax.data.captions import check_clean
from vlmjax.errors import BadRecord, DataError

BENCHMARKS = tuple(METRICS)


@dataclass(frozen=True)
class Benchmark:
    """What to measure; the fields are those of an entry of a recipe's `evals`.

    Attributes:
        name: under which results are reported.
        benchmark: `zeroshot`, `retrieval`, `probe`, `classify`, `vqa` (see `answers`, `asked`), `matching` (`pairs`),
            `caption` (`captioning`) or `statements`.
        data: a source (shards, folder file, `scenes:heldout`, ...).
        keep, exclude: regular expressions searched in record keys; empty: all records, none.
        examples: use the first this many records; 0 = all.
        classes: zero-shot, probe, classify: file of classes (see `data.labels.read_classes`); empty: the distinct
            captions, or those the classifier was trained with.
        templates: zero-shot: a set, file or template (see `templates.load_templates`); empty: `photo` with a
            classes file, else `plain`.
        batch_size: global; 0 = 256, for vqa 64.
        canonical: lower-case texts and delete their punctuation, as SigLIP's text towers expect.
        clean: of data.clean, by which the model was trained: texts are read, and captions compared, cleaned so.
        blind: vqa: every image in the mean colour: what the questions alone give away.
        max_new_tokens: vqa and caption: of what is written.
        min_new_tokens: caption: its end does not come before.
        num_beams: caption: 1 is greedy.
        prompt: caption: what a caption begins with, which is not part of it.
        rerank: retrieval: so many nearest candidates of each query are put in order by image-text matching, which
            BLIP can; 0 = none.
        answers: vqa of BLIP: a file of answers, one on each line, the likeliest of which is taken; empty: it writes.
        top: vqa of BLIP: only so many of them, those that begin likeliest; 0 = all.
        train: probe: the source whose records are fitted.
        train_examples: probe: the first this many of them; 0 = all.
        l2: probe: strength of the regularisation, see `logistic.Fitter`; 0 = chosen on some training records.
    """

    name: str
    benchmark: str
    data: str
    keep: str = ""
    exclude: str = ""
    examples: int = 0
    classes: str = ""
    templates: str | Sequence[str] = ""
    batch_size: int = 0
    canonical: bool = False
    clean: str = ""
    blind: bool = False
    max_new_tokens: int = 16
    min_new_tokens: int = 0
    num_beams: int = 1
    prompt: str = ""
    rerank: int = 0
    answers: str = ""
    top: int = 128
    train: str = ""
    train_examples: int = 0
    l2: float = 0.0

    def __post_init__(self) -> None:
        """Raise DataError for a benchmark, or a way to clean texts, that does not exist."""
        check_clean(self.clean)
        if self.benchmark not in BENCHMARKS:
            raise DataError(f"benchmark={self.benchmark!r}: expected one of {', '.join(BENCHMARKS)}")


@dataclass
class EvalResult:
    """What one evaluation found.

    Attributes:
        name, benchmark: of the Benchmark.
        metrics: fractions: `top1`, `top5`, `mean_per_class`, or `text_to_image_r1`, `_r5`, `_r10`,
            `image_to_text_r1`, ..., or `exact_match`, or `accuracy`, or `exact`, `bleu4`, `rouge_l`, `cider`.
        chance: the same names, the value of guessing at random; for `exact_match` of giving each kind of question
            its most frequent answer.
        counts: `records`, `used`, `skipped`, and how many images, texts or classes took part; for retrieval
            also what ties could change, where there are any.
        skipped_reasons: number of skipped records by reason.
        details: what the report shows (see `gallery`); empty on all processes but the first.
    """

    name: str
    benchmark: str
    metrics: dict[str, float]
    chance: dict[str, float]
    counts: dict[str, Any]
    skipped_reasons: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """The metrics as keys of a line in metrics.jsonl: `eval/<name>/<metric>`."""
        return {f"eval/{self.name}/{metric}": value for metric, value in self.metrics.items()}

    def to_json(self) -> dict[str, Any]:
        """Metrics and counts on one level, as the evaluate command writes them."""
        return {
            "benchmark": self.benchmark,
            **self.metrics,
            **self.counts,
            "skipped_reasons": self.skipped_reasons,
            "chance": self.chance,
        }


def benchmark_of(name: str, entry: Any) -> Benchmark:
    """The Benchmark that an entry of a recipe's `evals` describes."""
    return Benchmark(name=name, **{key: entry[key] for key in entry})


def select(source: Any, benchmark: Benchmark) -> list[int]:
    """Indices of the records whose key `keep` matches and `exclude` does not, the first `examples` of them.

    Raises DataError when none remains or a pattern is no regular expression.
    """
    indices: Any = range(len(source))
    if benchmark.keep or benchmark.exclude:
        try:
            keep, exclude = re.compile(benchmark.keep), re.compile(benchmark.exclude or r"(?!)")
        except re.error as error:
            raise DataError(f"{benchmark.name}: keep or exclude is no regular expression: {error}") from None
        indices = [i for i in indices if keep.search(key := key_at(source, i)) and not exclude.search(key)]
    indices = list(indices[: benchmark.examples] if benchmark.examples else indices)
    if not indices:
        raise DataError(
            f"{benchmark.name}: no record of {benchmark.data} remains of {len(source)} "
            f"(keep={benchmark.keep!r}, exclude={benchmark.exclude!r})"
        )
    return indices


def key_at(source: Any, index: int) -> str:
    """The key of a record, from the source's index where it has one; a bad record still names its key."""
    if hasattr(source, "key"):
        return source.key(index)
    try:
        return source[index].key
    except BadRecord as error:
        return error.key
