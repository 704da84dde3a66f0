"""Linear probe: what a linear classifier makes of a frozen image tower's features (CLIP, 2103.00020, section 3.2)."""

from typing import Any

import jax
import numpy as np

from vlmjax.data.labels import Classes, own_name, read_classes
from vlmjax.data.sources import open_source
from vlmjax.errors import DataError
from vlmjax.evals.benchmark import Benchmark, EvalResult, select
from vlmjax.evals.classes import labels_of, result_of
from vlmjax.evals.embed import Embedded, Embedder, gather, tower_state
from vlmjax.evals.logistic import Fitter, Logistic, search
from vlmjax.evals.pictures import Pictures
from vlmjax.evals.templates import load_templates
from vlmjax.models.clip import ClipVision

HELD_BACK = 5  # one in so many training records chooses the strength


class ProbeEvaluator:
    """Logistic regression on the tower's state of training images, scored on others.

    The state is the one before any projection: the normalised class token, or what a tower of another kind pools.
    Classes are those of a file, or the captions (of records without exactly one, the labels) of the training records.
    """

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
        """Open both sources; no image is decoded.

        Args:
            benchmark: what to measure; `train` names the records that are fitted.
            model: one with an image tower.
            tokenizer: not used.
            transform: an EvalTransform.
            mesh: the devices; every process of it has to make the same calls.
            source: used instead of opening `benchmark.data`.
            embedder: of `tower_state`, shared by probes of the same model.
            threads: records read at a time per process; 0 = number of CPU cores, at most 16.

        Raises:
            DataError: a source or the classes cannot be used, or the model has no image tower.
        """
        if not hasattr(model.config, "image") and not isinstance(model, ClipVision):
            raise DataError(f"{benchmark.name}: {type(model).__name__} has no image tower to probe")
        self.benchmark, self.mesh = benchmark, mesh
        self.classes, self._given = None, bool(benchmark.classes)
        if benchmark.classes:
            found, templates = read_classes(benchmark.classes), load_templates(benchmark.templates or "photo")
            self.classes = Classes([c.name for c in found], [c.label for c in found], templates)
        embedder = embedder or Embedder(model, tokenizer, transform, mesh, image_features=tower_state)
        size = min(transform.output_size or (64,))
        train = open_source(benchmark.train, image_size=size)
        source = open_source(benchmark.data, image_size=size) if source is None else source
        count = min(benchmark.train_examples or len(train), len(train))
        options = {"batch_size": benchmark.batch_size or 256, "threads": threads}
        name, chosen = benchmark.name, select(source, benchmark)
        self.train = Pictures(f"{name}, training", train, range(count), embedder, self._fitted, **options)
        self.pictures = Pictures(name, source, chosen, embedder, self._scored, **options)

    def run(self, params: Any, *, details: bool = True) -> EvalResult:
        """Fit and score a model's tower (parameters on the mesh). Every process gets the result.

        Raises:
            DataError: no record could be used, or the training records are all of one class.
            NonFiniteError: the features are not finite.
        """
        fitted = self.train.run(params)
        if not self._given:
            self.classes = self._named_by(fitted)
            place = {name: i for i, name in enumerate(self.classes.names)}
            for note in fitted.notes:
                note["label"] = place[note["name"]]
        names = self.classes.names
        logistic, l2 = self._fit(fitted.features, labels_of(fitted), len(names))
        seen = self.pictures.run(params)
        return result_of(
            self.benchmark,
            names,
            logistic.scores(seen.features),
            self.pictures,
            seen,
            kind="Linear probe",
            details=details,
            train_used=len(fitted.notes),
            train_skipped=len(fitted.skipped),
            l2=l2,
        )

    def _fitted(self, record: Any) -> dict[str, Any]:
        return {"label": self.classes.of(record)} if self._given else {"name": own_name(record)}

    def _scored(self, record: Any) -> dict[str, Any]:
        return {"label": self.classes.of(record)}

    def _named_by(self, fitted: Embedded) -> Classes:
        names = sorted({note["name"] for note in fitted.notes})
        if len(names) < 2:
            raise DataError(
                f"{self.benchmark.train}: all its records are of the class {names[0]!r}; give two or more"
            )
        return Classes(names)

    def _fit(self, features: np.ndarray, labels: np.ndarray, classes: int) -> tuple[Logistic, float]:
        """The classifier of all training records, and its strength: as given, or best on some held back."""
        l2, fit = self.benchmark.l2, Fitter(features, labels, classes, self.mesh)
        if not l2:
            order = np.random.default_rng(0).permutation(len(labels))
            held, kept = np.split(order, [max(1, len(order) // HELD_BACK)])

            def score(strength: float) -> float:
                right = fit(strength, kept).scores(features[held]).argmax(axis=1) == labels[held]
                return gather(float(right.mean()))[0]  # hosts of another kind might add up otherwise

            l2 = search(score)
        return fit(l2), l2
