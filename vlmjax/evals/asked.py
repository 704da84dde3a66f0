"""Benchmark `vqa` of BLIP: answers that its decoder writes, or the likeliest of a list."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmjax.data.captions import blip_question
from vlmjax.data.questions import asked_in
from vlmjax.data.sources import open_source
from vlmjax.decode import ranking
from vlmjax.decode.language import language_of
from vlmjax.errors import DataError
from vlmjax.evals.answers import Question, Questioner
from vlmjax.evals.benchmark import Benchmark, select
from vlmjax.evals.writing import Writer, until
from vlmjax.models.blip_tasks import BlipVqa
from vlmjax.ops.pixels import normalized
from vlmjax.sharding.activations import on_mesh
from vlmjax.sharding.mesh import local_rows, replicated, to_global


class BlipAnswerEvaluator(Questioner):
    """Every question of a record by itself, without what was said before it; any of its answers is right."""

    def __init__(
        self,
        benchmark: Benchmark,
        model: BlipVqa,
        tokenizer: Any,
        transform: Any,
        mesh: jax.sharding.Mesh,
        *,
        source: Any = None,
        writer: Writer | None = None,
        threads: int = 0,
    ):
        """Open the source and the list of answers. Arguments are those of `answers.AnswerEvaluator`."""
        if source is None:
            source = open_source(benchmark.data, image_size=min(transform.output_size or (64,)))
        super().__init__(benchmark, transform, mesh, source, select(source, benchmark), threads)
        self.model, self.tokenizer = model, tokenizer
        self.writer = writer or Writer(model, transform, mesh)
        self.batch_size = self.writer.rows_per_batch(benchmark.batch_size or 64)
        self.ranker = Ranker(benchmark, model, tokenizer, transform, mesh) if benchmark.answers else None

    def _questions_of(self, index: int) -> list[Question]:
        record = self.source[index]
        out = []
        for one in asked_in(record.extra, record.key):
            text = blip_question(one.question) if self.benchmark.clean else one.question
            prompt = np.array(self.tokenizer.encode(text), np.int32)
            out.append(Question(index, one.question, prompt, 1, one.answers))
        return out

    def _continue(
        self, params: Any, prompts: Sequence[np.ndarray], length: int, pixels: np.ndarray
    ) -> list[str]:
        length = min(length, self.model.config.text.max_length)  # that of a bucket may be more than there are
        if self.ranker is not None:
            return self.ranker(params, prompts, length, pixels[:, 0], self.batch_size)
        config = self.model.config
        ends = (config.sep_token_id,)
        new = self.benchmark.max_new_tokens
        options = {"max_new_tokens": new, "ends": ends, "pad": config.text.pad_token_id}
        tokens = self.writer(params, prompts, length, pixels[:, 0], self.batch_size, **options)
        return [self.tokenizer.decode(until(ids, ends)).strip() for ids in tokens]

    def _slots(self) -> int:
        return 1

    def _image_shape(self) -> tuple[int, int]:
        return self.model.config.image.image_shape


class Ranker:
    """The likeliest answer of a list to each question, as one compiled function for each bucket of their length.

    By the loss of training, label smoothing included, of those whose first token is likeliest (Li et al. 2022,
    2201.12086, section 5.3; salesforce/BLIP, models/blip_vqa.py).
    """

    def __init__(
        self, benchmark: Benchmark, model: BlipVqa, tokenizer: Any, transform: Any, mesh: jax.sharding.Mesh
    ):
        """Read and tokenise the list. Raises DataError."""
        self.mesh = mesh
        self.answers = read_answers(benchmark.answers)
        found = [np.array(tokenizer.encode(text)[1:], np.int32) for text in self.answers]  # without [CLS]
        longest = max(map(len, found))
        ids, mask = np.zeros((2, len(found), longest), np.int32)
        for row, one in enumerate(found):
            ids[row, : len(one)], mask[row, : len(one)] = one, 1
        self._ids, self._mask = ids, mask
        language = language_of(model)
        top = benchmark.top if 0 < benchmark.top < len(found) else None
        smoothing = model.config.label_smoothing

        @on_mesh(mesh)
        def best(params: Any, given: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
            pixels = normalized(given["pixel_values"], transform.mean, transform.std)
            inputs = model.asked(given["input_ids"], given["attention_mask"], pixels)
            whole = (pixels.shape[0], *ids.shape)
            ids, mask = (jnp.broadcast_to(x[None], whole) for x in (ids, mask))
            sums, _ = ranking.scores(language, top, smoothing, params, inputs, ids, mask)
            return sums.argmax(axis=1)

        self._best = jax.jit(best, out_shardings=replicated(mesh))

    def __call__(
        self, params: Any, prompts: Sequence[np.ndarray], length: int, pixels: np.ndarray, batch_size: int
    ) -> list[str]:
        """An answer to each of at most `batch_size` questions; arguments as of `Writer`."""
        ids, mask = np.zeros((2, batch_size, length), np.int32)
        mask[:, 0] = 1
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
        own = local_rows(self.mesh, batch_size)
        rows = slice(own.start, own.stop)
        local = {"input_ids": ids[rows], "attention_mask": mask[rows], "pixel_values": pixels}
        given = to_global(local, self.mesh, batch_size)
        best = np.asarray(self._best(params, given, self._ids, self._mask))
        return [self.answers[place] for place in best[: len(prompts)].tolist()]


def read_answers(path: str) -> list[str]:
    """The lines of a file, no two equal. Raises DataError."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"answers={path!r} cannot be read: {error}") from None
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(found) < 2:
        raise DataError(f"answers={path!r} has {len(found)} answer(s); give two or more, one on each line")
    return found
