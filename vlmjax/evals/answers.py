"""Questions about images answered by a model that writes: asked, generated, compared with the right answers."""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from vlmjax.data.conversation import Conversation, count, from_caption, from_turns
from vlmjax.data.form import Form, cut, ends_of
from vlmjax.data.generative import QUESTIONS, images_of
from vlmjax.data.images import decode
from vlmjax.data.pieces import Pieces
from vlmjax.data.sources import captions_of, open_source, turns_of
from vlmjax.errors import BadRecord, DataError
from vlmjax.evals.benchmark import Benchmark, EvalResult, key_at, select
from vlmjax.evals.embed import gather
from vlmjax.evals.gallery import spread, square_picture
from vlmjax.evals.matching import is_right, score
from vlmjax.evals.writing import Writer, batches, until
from vlmjax.sharding.mesh import local_rows

_log = logging.getLogger(__name__)


class Question(NamedTuple):
    """One question about the images of a record.

    Attributes:
        index: of the record in the source.
        text: what is asked.
        prompt: ids of the conversation up to the answer, int32 [n].
        images: how many of the record's images are in it.
        answers: the right ones, any of which will do.
    """

    index: int
    text: str
    prompt: np.ndarray
    images: int
    answers: tuple[str, ...]


class Questioner:
    """Asks a model all questions of a source, and compares its answers; how it is asked is up to the kinds below."""

    batch_size: int

    def __init__(
        self,
        benchmark: Benchmark,
        transform: Any,
        mesh: jax.sharding.Mesh,
        source: Any,
        indices: list[int],
        threads: int,
    ):
        """`indices` are the records of `source` that are asked about."""
        self.benchmark, self.transform, self.mesh = benchmark, transform, mesh
        self.source, self.indices = source, indices
        self._threads = threads or min(os.cpu_count() or 1, 16)
        self._asked: tuple[list[Question], dict[int, BadRecord]] | None = None

    def _questions_of(self, index: int) -> list[Question]:
        """The questions of a record. Raises BadRecord."""
        raise NotImplementedError

    def _continue(
        self, params: Any, prompts: Sequence[np.ndarray], length: int, pixels: np.ndarray
    ) -> list[str]:
        """The answers to prompts padded to `length`; pixels uint8 [own rows, slots, height, width, 3]."""
        raise NotImplementedError

    def _slots(self) -> int:
        """Places for images in a row."""
        raise NotImplementedError

    def _image_shape(self) -> tuple[int, int]:
        """Height and width of the model's images."""
        raise NotImplementedError

    def run(self, params: Any, *, details: bool = True) -> EvalResult:
        """Measure a model's parameters (on the mesh). Every process gets the result.

        Args:
            params: the model's parameters.
            details: also collect what the report shows (reads some pictures again).

        Raises:
            DataError: no record could be used.
        """
        if self._asked is None:
            self._asked = self._questions()
        questions, bad = self._asked[0], dict(self._asked[1])
        written = self._written(params, questions, bad)
        used = [at for at, question in enumerate(questions) if question.index not in bad]
        reasons = dict(Counter(error.reason for error in bad.values()))
        for error in itertools.islice(bad.values(), 20):
            _log.warning("%s: skipped %s: %s %s", self.benchmark.name, error.key, error.reason, error.detail)
        if not used:
            raise DataError(
                f"{self.benchmark.data}: none of {len(self.indices)} records could be used ({reasons})"
            )
        questions, written = [questions[at] for at in used], [written[at] for at in used]
        scored = score([q.text for q in questions], [q.answers for q in questions], written)
        counts = {"records": len(self.indices), "used": len(self.indices) - len(bad), "skipped": len(bad)}
        result = EvalResult(
            self.benchmark.name,
            "vqa",
            scored["metrics"],
            scored["chance"],
            counts | scored["counts"],
            reasons,
        )
        if details and jax.process_index() == 0:
            samples = self._samples(questions, written)
            result.details = {"samples": samples, "kinds": scored["kinds"], "blind": self.benchmark.blind}
        return result

    def _questions(self) -> tuple[list[Question], dict[int, BadRecord]]:
        """What is asked, and which records cannot be used; no image is decoded for it."""
        asked: list[Question] = []
        bad: dict[int, BadRecord] = {}
        for index in self.indices:
            try:
                asked += self._questions_of(index)
            except BadRecord as error:
                key = error.key or key_at(self.source, index)
                bad[index] = BadRecord(error.reason, key, error.detail)
        return asked, bad

    def _written(self, params: Any, questions: Sequence[Question], bad: dict[int, BadRecord]) -> list[str]:
        """The model's answer to each question; `bad` gets the records whose images could not be read."""
        out, failed = [""] * len(questions), []
        own = local_rows(self.mesh, self.batch_size)
        with ThreadPoolExecutor(self._threads) as pool:
            for length, places in batches([len(q.prompt) for q in questions], self.batch_size):
                rows = [questions[place] for place in places]
                pixels = np.zeros((len(own), self._slots(), *self._image_shape(), 3), np.uint8)
                mine = rows[own.start : own.stop]
                read = pool.map(self._images, mine)
                for row, (question, (images, why)) in enumerate(zip(mine, read, strict=True)):
                    pixels[row, : len(images)] = np.stack(images) if images else 0
                    failed += [(question.index, *why)] if why else []
                prompts = [question.prompt for question in rows]
                for place, text in zip(places, self._continue(params, prompts, length, pixels), strict=True):
                    out[place] = text
        for index, key, reason, detail in itertools.chain(*gather(failed)):
            bad.setdefault(index, BadRecord(reason, key, detail))
        return out

    def _images(self, question: Question) -> tuple[list[np.ndarray], tuple[str, str, str] | None]:
        """The images of a question, in the mean colour for a blind look; or none and (key, reason, detail)."""
        key = ""
        try:
            record = self.source[question.index]
            key, found = record.key, images_of(record)
            if len(found) < question.images:
                detail = f"{question.images} images in the text, {len(found)} in the record"
                raise BadRecord("image_marks", key, detail)
            images = [self._pixels(image) for image in found[: question.images]]
        except BadRecord as error:
            return [], (error.key or key, error.reason, error.detail)
        return images, None

    def _pixels(self, image: Any) -> np.ndarray:
        pixels = self.transform(decode(image, background=self.transform.background))
        return np.broadcast_to(self._mean_colour(), pixels.shape) if self.benchmark.blind else pixels

    def _mean_colour(self) -> np.ndarray:
        return np.rint(255 * np.asarray(self.transform.mean)).astype(np.uint8)

    def _samples(self, questions: Sequence[Question], written: Sequence[str]) -> list[dict[str, Any]]:
        """Some questions with picture and answer: the same ones every time."""
        return [
            {
                "image": self._picture(questions[at]),
                "question": questions[at].text,
                "expected": questions[at].answers[0],
                "answer": written[at],
                "right": is_right(questions[at].answers, written[at]),
            }
            for at in spread(len(questions))
        ]

    def _picture(self, question: Question, size: int = 96) -> np.ndarray:
        """A small picture of what the model saw."""
        found = images_of(self.source[question.index])
        if self.benchmark.blind or not found:
            return np.full((size, size, 3), self._mean_colour(), np.uint8)
        return square_picture(found[0], self.transform.background, size)


class AnswerEvaluator(Questioner):
    """Benchmark `vqa`, with its opened source and compiled generation, to be run again and again.

    Each answer of a conversation is asked for, the rounds before it in the prompt with their true answers. A record of
    captions alone is one question, to which each of its captions is a right answer.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        model: Any,
        tokenizer: Any,
        transform: Any,
        mesh: jax.sharding.Mesh,
        form: Form,
        *,
        source: Any = None,
        images_per_row: int = 1,
        writer: Writer | None = None,
        threads: int = 0,
    ):
        """Open the source and check what can be checked before the model runs.

        Args:
            benchmark: what to measure.
            model: a `models.vlm.Vlm`.
            tokenizer: the model's `text.Tokenizer`.
            transform: an EvalTransform: pixels -> uint8 crop, with `mean` and `std`.
            mesh: the devices; every process of it has to make the same calls.
            form: how the model was spoken to in training.
            source: used instead of opening `benchmark.data`.
            images_per_row: places for images; a prompt with more is skipped.
            writer: shared by evaluators of the same model, so that programs are compiled once.
            threads: images read at a time per process; 0 = number of CPU cores, at most 16.

        Raises:
            DataError: the source or the template cannot be used, or no record remains.
        """
        if source is None:
            source = open_source(benchmark.data, image_size=min(transform.output_size or (64,)))
        super().__init__(benchmark, transform, mesh, source, select(source, benchmark), threads)
        self.model, self.form, self.slots = model, form, images_per_row
        self.tokenizer, self.pieces = tokenizer, Pieces(tokenizer)
        self.ends, self.stops = ends_of(form.template, self.pieces)
        words = self.pieces.template(form.template)
        self._asks = words is None or words.user_is_text
        self.writer = writer or Writer(model, transform, mesh)
        self.batch_size = self.writer.rows_per_batch(benchmark.batch_size or 64)

    def _questions_of(self, index: int) -> list[Question]:
        turns = turns_of(self.source, index)
        captions = () if turns else captions_of(self.source, index)
        if turns:
            said = from_turns(turns)
        elif captions:
            said = from_caption(captions[0], QUESTIONS[0])
        else:
            raise BadRecord("no_question", "", "the record has neither a conversation nor a caption")
        asked: list[Question] = []
        for place, message in enumerate(said):
            if message.role != "assistant":
                continue
            try:
                asked.append(self._question(index, said[:place], captions or (message.text,)))
            except BadRecord as error:
                if not asked or error.reason != "too_long":
                    raise
                break  # training cuts such a conversation here too
        return asked

    def _question(self, index: int, before: Conversation, answers: Sequence[str]) -> Question:
        config, images = self.model.config, count(before)
        prompt = self.form.prompt(
            before, self.pieces, image_tokens=config.image_tokens, image_token_id=config.image_token_id
        )
        if images > self.slots:
            raise BadRecord("too_many_images", "", f"{images} of {self.slots}")
        if len(prompt) + self.benchmark.max_new_tokens > config.text.max_length:
            detail = f"{len(prompt)} tokens and {self.benchmark.max_new_tokens} of the answer"
            raise BadRecord("too_long", "", detail)
        said = "".join(part.text for part in before[-1].parts if part.kind == "text").strip()
        text = said if self._asks else ""
        return Question(index, text, prompt, images, tuple(answers))

    def _continue(
        self, params: Any, prompts: Sequence[np.ndarray], length: int, pixels: np.ndarray
    ) -> list[str]:
        new, pad = self.benchmark.max_new_tokens, self.pieces.pad_token_id
        options = {"max_new_tokens": new, "ends": self.ends, "pad": pad}
        tokens = self.writer(params, prompts, length, pixels, self.batch_size, **options)
        return [cut(self.tokenizer.decode(until(ids, self.ends)), self.stops) for ids in tokens]

    def _slots(self) -> int:
        return self.slots

    def _image_shape(self) -> tuple[int, int]:
        return self.model.config.image.image_shape
