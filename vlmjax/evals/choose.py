"""What runs a benchmark: one evaluator for each kind, around one compiled model."""

import functools
from typing import Any

import jax

from vlmjax.data.form import Form
from vlmjax.errors import DataError
from vlmjax.evals.answers import AnswerEvaluator
from vlmjax.evals.asked import BlipAnswerEvaluator
from vlmjax.evals.benchmark import Benchmark
from vlmjax.evals.captioning import CaptionEvaluator
from vlmjax.evals.classify import ClassifyEvaluator, scores
from vlmjax.evals.embed import Embedder, tower_state
from vlmjax.evals.pairs import MatchingEvaluator
from vlmjax.evals.probe import ProbeEvaluator
from vlmjax.evals.rerank import Matcher
from vlmjax.evals.runner import Evaluator
from vlmjax.evals.statements import StatementEvaluator
from vlmjax.evals.writing import Writer
from vlmjax.models.blip_tasks import BlipVqa

# The methods that a model has to have for each benchmark, any of these sets of them, and what such a model is called.
NEEDS = {
    "zeroshot": ([("encode_image", "encode_text")], "both towers"),
    "retrieval": ([("encode_image", "encode_text")], "both towers"),
    "vqa": (
        [("image_features", "prepare"), ("encode_question",)],
        "a model that answers questions about images",
    ),
    "matching": ([("match",)], "a model that says whether image and text match (BLIP)"),
    "caption": ([("decode_text",)], "a model that writes captions (BLIP)"),
    "classify": ([("classes",)], "a classifier"),
    "statements": ([("judge",)], "a model that judges statements about two images (BLIP)"),
}
# Benchmarks of images alone.
WITHOUT_TEXT = ("probe", "classify")


def missing(model: Any, benchmark: str) -> tuple[str, str]:
    """A method that a model lacks for a benchmark, "" for none, and what is needed, in words."""
    ways, needs = NEEDS.get(benchmark, ([()], ""))
    lacking = [[name for name in way if not hasattr(model, name)] for way in ways]
    return ("" if [] in lacking else lacking[0][0]), needs


class Evaluators:
    """Makes the evaluators of one model, which share what they compile."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        transform: Any,
        mesh: jax.sharding.Mesh,
        *,
        form: Form | None = None,
        images_per_row: int = 1,
    ):
        """`form` and `images_per_row` are for vqa: how the model is spoken to, and places for images."""
        self._parts = {"model": model, "tokenizer": tokenizer, "transform": transform, "mesh": mesh}
        self._form, self._images_per_row = form or Form(), images_per_row

    @functools.cached_property
    def _embedder(self) -> Embedder:
        return Embedder(**self._parts)

    @functools.cached_property
    def _matcher(self) -> Matcher:
        if lacks := missing(self._parts["model"], "matching")[0]:
            kind = type(self._parts["model"]).__name__
            raise DataError(
                f"rerank: {kind} has no {lacks}; only BLIP looks at image and text together, leave it 0"
            )
        return Matcher(**self._parts)

    @functools.cached_property
    def _states(self) -> Embedder:
        return Embedder(**self._parts, image_features=tower_state)

    @functools.cached_property
    def _scores(self) -> Embedder:
        return Embedder(**self._parts, image_features=scores)

    @functools.cached_property
    def _writer(self) -> Writer:
        return Writer(*(self._parts[name] for name in ("model", "transform", "mesh")))

    def of(self, benchmark: Benchmark, source: Any = None) -> Any:
        """The evaluator of a benchmark, its source opened. Raises DataError where that cannot be used."""
        parts = {**self._parts, "source": source}
        match benchmark.benchmark:
            case "vqa" if isinstance(self._parts["model"], BlipVqa):
                return BlipAnswerEvaluator(benchmark, **parts, writer=self._writer)
            case "statements":
                return StatementEvaluator(benchmark, **parts)
            case "vqa":
                said = {"form": self._form, "images_per_row": self._images_per_row, "writer": self._writer}
                return AnswerEvaluator(benchmark, **parts, **said)
            case "probe":
                return ProbeEvaluator(benchmark, **parts, embedder=self._states)
            case "classify":
                return ClassifyEvaluator(benchmark, **parts, embedder=self._scores)
            case "matching":
                return MatchingEvaluator(benchmark, **parts)
            case "caption":
                return CaptionEvaluator(benchmark, **parts, writer=self._writer)
        matcher = self._matcher if benchmark.rerank else None
        return Evaluator(benchmark, **parts, embedder=self._embedder, matcher=matcher)
