"""One benchmark from a source of records to numbers: for the training loop and the evaluate command."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vlmjax.data.canonical import canonicalize_class, canonicalize_plain, canonicalize_template
from vlmjax.data.captions import cleaned
from vlmjax.data.labels import ClassFinder, ClassName, label_of, read_classes
from vlmjax.data.sources import open_source
from vlmjax.errors import BadRecord, DataError
from vlmjax.evals import gallery, zeroshot
from vlmjax.evals.benchmark import Benchmark, EvalResult, select
from vlmjax.evals.embed import Embedded, Embedder
from vlmjax.evals.pictures import Pictures, reasons
from vlmjax.evals.rerank import Matcher, pairs_to_match
from vlmjax.evals.retrieval import Rescore, distinct_captions, score_retrieval
from vlmjax.evals.templates import fill, load_templates


class Evaluator:
    """A benchmark with its opened source and compiled towers, to be run again and again."""

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
        matcher: Matcher | None = None,
        threads: int = 0,
    ):
        """Open the source and check what can be checked before the model runs.

        Args:
            benchmark: what to measure.
            model: a dual encoder with methods `encode_image` and `encode_text` (see `vlmjax.models.clip`).
            tokenizer: texts -> `input_ids`, `attention_mask`, int32 [texts, length].
            transform: an EvalTransform: pixels -> uint8 crop, with `mean` and `std`.
            mesh: the devices; every process of it has to make the same calls.
            source: used instead of opening `benchmark.data`.
            embedder: shared by evaluators of the same model, so that each tower is compiled once.
            matcher: likewise, where candidates are ranked again (`benchmark.rerank`), which takes a BLIP.
            threads: records read at a time per process; 0 = number of CPU cores, at most 16.

        Raises:
            DataError: the source, the classes or the templates cannot be used, or no record remains.
        """
        self.benchmark, self.mesh = benchmark, mesh
        self.embedder = embedder or Embedder(model, tokenizer, transform, mesh)
        self.matcher = matcher or (Matcher(model, tokenizer, transform, mesh) if benchmark.rerank else None)
        if source is None:
            source = open_source(benchmark.data, image_size=min(transform.output_size or (64,)))
        self.classes = read_classes(benchmark.classes) if benchmark.classes else None
        self.templates = load_templates(benchmark.templates or ("photo" if self.classes else "plain"))
        self.pictures = Pictures(
            benchmark.name,
            source,
            select(source, benchmark),
            self.embedder,
            self._describe,
            batch_size=benchmark.batch_size or 256,
            threads=threads,
        )

    def run(self, params: Any, *, details: bool = True) -> EvalResult:
        """Measure a model's parameters (on the mesh). Every process gets the result.

        Args:
            params: the model's parameters.
            details: also collect what the report shows (reads some pictures again).

        Raises:
            DataError: no record could be used, or a record's class cannot be told.
            NonFiniteError: the embeddings are not finite.
        """
        embedded = self.pictures.run(params)
        score = self._zeroshot if self.benchmark.benchmark == "zeroshot" else self._retrieval
        metrics, chance, more, shown = score(params, embedded)
        result = EvalResult(
            self.benchmark.name,
            self.benchmark.benchmark,
            metrics,
            chance,
            self.pictures.counts(embedded) | more,
            reasons(embedded),
        )
        if details and jax.process_index() == 0:
            result.details = shown(lambda at: self.pictures.thumbnail(embedded.notes[at]["index"]))
        return result

    def _describe(self, record: Any) -> dict[str, Any]:
        captions = list(record.captions)
        if self.classes is not None:
            return {"captions": captions, "label": label_of(record.extra)}
        if not captions:
            raise BadRecord("no_caption", record.key, "the record has an image but no text")
        return {"captions": captions}

    def _texts(self, params: Any, texts: Sequence[str]) -> np.ndarray:
        texts = [cleaned(text, self.benchmark.clean) for text in texts]
        if self.benchmark.canonical:
            texts = [canonicalize_plain(text) for text in texts]
        return self.embedder.texts(params, texts, self.pictures.batch_size)

    def _zeroshot(self, params: Any, embedded: Embedded) -> tuple:
        captions = [note["captions"] for note in embedded.notes]
        if self.classes is not None:
            finder = ClassFinder(self.classes, self.templates)
            labels = [[finder.find(note["key"], note["label"], note["captions"])] for note in embedded.notes]
            classes = self.classes
        else:
            names, labels, _ = distinct_captions(captions)
            classes = [ClassName(name, name) for name in names]
            if len(classes) < 2:
                raise DataError(
                    f"{self.benchmark.data}: its one caption is one class; at least two are needed"
                )
        prompts = [self._prompt(t, c.name) for c, t in itertools.product(classes, self.templates)]
        features = self._texts(params, prompts).reshape(len(classes), len(self.templates), -1)
        scored = zeroshot.score_zeroshot(zeroshot.build_classifier(features), embedded.features, labels)
        more = {"classes": len(classes), "templates": len(self.templates)}
        names = [c.name for c in classes]

        def shown(thumbnail: Any) -> dict[str, Any]:
            return gallery.zeroshot_details(names, labels, scored["predictions"], thumbnail)

        return scored["metrics"], scored["chance"], more, shown

    def _prompt(self, template: str, name: str) -> str:
        if self.benchmark.canonical:
            return fill(canonicalize_template(template), canonicalize_class(name).split(",")[0])
        return fill(template, name)

    def _rescore(
        self, params: Any, embedded: Embedded, texts: Sequence[str], features: np.ndarray
    ) -> dict[str, Rescore]:
        """How the nearest candidates are scored again, by looking at image and text together."""
        k, indices = self.benchmark.rerank, [note["index"] for note in embedded.notes]
        numbers = pairs_to_match(embedded.features, features, k)
        size = {"batch_size": self.pictures.batch_size, "threads": self.pictures.threads}
        read = [cleaned(text, self.benchmark.clean) for text in texts]
        matches = self.matcher(params, self.pictures.source, indices, read, numbers, **size)
        return {
            "text_to_image": lambda rows, cosines: matches.rescored(rows, cosines, k, True),
            "image_to_text": lambda rows, cosines: matches.rescored(rows, cosines, k, False),
        }

    def _retrieval(self, params: Any, embedded: Embedded) -> tuple:
        texts, texts_of_image, images_of_text = distinct_captions(
            [note["captions"] for note in embedded.notes]
        )
        features = self._texts(params, texts)
        rescore = self._rescore(params, embedded, texts, features) if self.benchmark.rerank else None
        scored = score_retrieval(embedded.features, features, texts_of_image, images_of_text, rescore)
        more = {"images": len(texts_of_image), "texts": len(texts), **scored["ties"]}

        def shown(thumbnail: Any) -> dict[str, Any]:
            return gallery.retrieval_details(
                embedded.features, features, texts, texts_of_image, images_of_text, scored["ranks"], thumbnail
            )

        return scored["metrics"], scored["chance"], more, shown
