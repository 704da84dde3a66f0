"""What a classifier says of images whose class is known."""

from typing import Any

import jax

from vlmjax.data.labels import Classes, read_classes
from vlmjax.data.sources import open_source
from vlmjax.errors import DataError
from vlmjax.evals.benchmark import Benchmark, EvalResult, select
from vlmjax.evals.classes import result_of
from vlmjax.evals.embed import Embedder
from vlmjax.evals.pictures import Pictures


class ClassifyEvaluator:
    """Top-1, top-5 and the mean over classes of a head's scores."""

    def __init__(
        self,
        benchmark: Benchmark,
        model: Any,
        tokenizer: Any,
        transform: Any,
        mesh: jax.sharding.Mesh,
        *,
        source: Any = None,
        embedder: Embedder | None = None,
        threads: int = 0,
    ):
        """Open the source; no image is decoded.

        Args:
            benchmark: what to measure; `classes`, a file with a line for each output of the head in their order, says
                what these data call them where the model was trained on others.
            model: a models/classifier.py Classifier.
            tokenizer: not used.
            transform: an EvalTransform.
            mesh: the devices; every process of it has to make the same calls.
            source: used instead of opening `benchmark.data`.
            embedder: of `scores`, shared by evaluators of the same model.
            threads: records read at a time per process; 0 = number of CPU cores, at most 16.

        Raises:
            DataError: the source or the classes cannot be used.
        """
        self.benchmark = benchmark
        self.classes = Classes(model.config.names, model.config.labels)
        if benchmark.classes:
            given, number = read_classes(benchmark.classes), len(self.classes.names)
            if len(given) != number:
                raise DataError(
                    f"{benchmark.classes}: {len(given)} classes; the head has {number}, in an order of its own"
                )
            self.classes = Classes([c.name for c in given], [c.label for c in given])
        if source is None:
            source = open_source(benchmark.data, image_size=min(transform.output_size or (64,)))
        self.pictures = Pictures(
            benchmark.name,
            source,
            select(source, benchmark),
            embedder or Embedder(model, tokenizer, transform, mesh, image_features=scores),
            lambda record: {"label": self.classes.of(record)},
            batch_size=benchmark.batch_size or 256,
            threads=threads,
        )

    def run(self, params: Any, *, details: bool = True) -> EvalResult:
        """Score a model's parameters (on the mesh). Every process gets the result.

        Raises:
            DataError: no record could be used.
            NonFiniteError: the scores are not finite.
        """
        seen, names = self.pictures.run(params), self.classes.names
        made = {"kind": "Classification", "details": details}
        return result_of(self.benchmark, names, seen.features, self.pictures, seen, **made)


def scores(model: Any, pixels: jax.Array) -> jax.Array:
    """Of a bound classifier."""
    return model(pixels)
