"""One benchmark from a source of records to numbers: for the training loop and the evaluate command."""

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vlmjax.data.captions import cleaned
from vlmjax.data.sources import open_source
from vlmjax.errors import BadRecord, DataError
from vlmjax.evals import gallery, zeroshot
from vlmjax.evals.benchmark import Benchmark, EvalResult, select
from vlmjax.evals.embed import CACHE_BYTES, Embedded, Embedder, read_batches, tell_skipped
from vlmjax.evals.labels import ClassFinder, ClassName, label_of, read_classes
from vlmjax.evals.retrieval import distinct_captions, score_retrieval
from vlmjax.evals.templates import fill, load_templates
from vlmjax.sharding.mesh import local_rows


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
            threads: records read at a time per process; 0 = number of CPU cores, at most 16.

        Raises:
            DataError: the source, the classes or the templates cannot be used, or no record remains.
        """
        self.benchmark, self.mesh = benchmark, mesh
        self.embedder = embedder or Embedder(model, tokenizer, transform, mesh)
        if source is None:
            source = open_source(benchmark.data, image_size=min(transform.output_size or (64,)))
        self.source = source
        self.indices = select(self.source, benchmark)
        self.classes = read_classes(benchmark.classes) if benchmark.classes else None
        self.templates = load_templates(benchmark.templates or ("photo" if self.classes else "plain"))
        self.batch_size = self.embedder.rows_per_batch(benchmark.batch_size or 256, len(self.indices))
        self._threads = threads or min(os.cpu_count() or 1, 16)
        self._cached: list | None = None

    def run(self, params: Any, *, details: bool = True) -> EvalResult:
        """Measure a model's parameters (on the mesh). Every process gets the result.

        Args:
            params: the model's parameters.
            details: also collect what the report shows (reads some pictures again).

        Raises:
            DataError: no record could be used, or a record's class cannot be told.
            NonFiniteError: the embeddings are not finite.
        """
        embedded = self.embedder.images(params, self._batches(), self.batch_size)
        reasons = dict(Counter(row["reason"] for row in embedded.skipped))
        tell_skipped(self.benchmark.name, embedded.skipped)
        if not embedded.notes:
            raise DataError(
                f"{self.benchmark.data}: none of {len(self.indices)} records could be used ({reasons})"
            )
        counts = {"records": len(self.indices), "used": len(embedded.notes), "skipped": len(embedded.skipped)}
        score = self._zeroshot if self.benchmark.benchmark == "zeroshot" else self._retrieval
        metrics, chance, more, shown = score(params, embedded)
        result = EvalResult(
            self.benchmark.name, self.benchmark.benchmark, metrics, chance, counts | more, reasons
        )
        if details and jax.process_index() == 0:
            result.details = shown(lambda at: self.thumbnail(embedded.notes[at]["index"]))
        return result

    def thumbnail(self, index: int, size: int = 72) -> np.ndarray:
        """A small uint8 [height, width, 3] picture of a record of the source."""
        return gallery.square_picture(self.source[index].image, self.embedder.transform.background, size)

    def _batches(self) -> Any:
        """Host batches: read, and kept for the next run while they are small."""
        if self._cached is not None:
            return self._cached
        rows = local_rows(self.mesh, self.batch_size)
        batches = read_batches(
            self.source,
            self.indices,
            rows,
            self.batch_size,
            self.embedder.transform,
            self._describe,
            threads=self._threads,
        )
        height, width = self.embedder.transform.output_size
        total = -(-len(self.indices) // self.batch_size) * len(rows) * height * width * 3
        if total <= CACHE_BYTES:
            self._cached = batches = list(batches)
        return batches

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
            texts = [zeroshot.canonicalize_plain(text) for text in texts]
        return self.embedder.texts(params, texts, self.batch_size)

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
            return fill(
                zeroshot.canonicalize_template(template), zeroshot.canonicalize_class(name).split(",")[0]
            )
        return fill(template, name)

    def _retrieval(self, params: Any, embedded: Embedded) -> tuple:
        texts, texts_of_image, images_of_text = distinct_captions(
            [note["captions"] for note in embedded.notes]
        )
        features = self._texts(params, texts)
        scored = score_retrieval(embedded.features, features, texts_of_image, images_of_text)
        more = {"images": len(texts_of_image), "texts": len(texts), **scored["ties"]}

        def shown(thumbnail: Any) -> dict[str, Any]:
            return gallery.retrieval_details(
                embedded.features, features, texts, texts_of_image, images_of_text, scored["ranks"], thumbnail
            )

        return scored["metrics"], scored["chance"], more, shown
