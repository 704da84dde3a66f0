"""Questions about an image and their answers, each with a weight: rows of BLIP's training for VQA."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmjax.data import images, plan
from vlmjax.data.captions import blip_question
from vlmjax.data.conversation import MARK, from_turns, rounds, turns_in
from vlmjax.data.examples import Made, RowExamples
from vlmjax.data.formats.fields import QUESTION, fields_of
from vlmjax.data.loader import Batch
from vlmjax.data.record import Record
from vlmjax.data.sources import Source
from vlmjax.data.text import Tokenizer
from vlmjax.errors import BadRecord

# Under which names a record's fields have the answers to its question.
ANSWERS, WEIGHTS = ("answers", "answer"), "answer_weights"


class Asked(NamedTuple):
    """A question and its answers, no two equal, each with its weight; the weightiest first."""

    question: str
    answers: tuple[str, ...]
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Questions:
    """What a row of questions is.

    Attributes:
        answers: places for the different answers of a question; those with the least weight are left out beyond.
        answer_length: tokens of an answer, special tokens included.
    """

    answers: int = 10
    answer_length: int = 10


def asked_in(extra: Mapping[str, Any], key: str = "") -> list[Asked]:
    """The questions of a record: its fields `question` and `answers`, or the rounds of its conversation.

    `answers` is a text, a list of texts or of {"answer": text} as VQAv2 has it. The weight of an answer is its share
    of the list (Li et al. 2022, 2201.12086, appendix), unless `answer_weights` gives one for each.

    Raises:
        BadRecord: `no_question`, or `no_answer` for a question without any.
    """
    fields = fields_of(extra, key)
    if QUESTION in fields:
        return [_of_fields(fields, key)]
    turns = turns_in(extra, key)
    if not turns:
        raise BadRecord("no_question", key, f"neither a field {QUESTION!r} nor a conversation")
    _, said = rounds(from_turns(turns, key), key)
    return [
        Asked(_words(asked.text), (answer.text.strip(),), (1.0,))
        for asked, answer in zip(said[::2], said[1::2], strict=False)
    ]


def _of_fields(extra: Mapping[str, Any], key: str) -> Asked:
    question = extra[QUESTION]
    if not isinstance(question, str) or not _words(question):
        raise BadRecord("no_question", key, f"{QUESTION} is {question!r}")
    found = list(_texts(next((extra[name] for name in ANSWERS if name in extra), ())))
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise BadRecord("no_answer", key, f"answers are {found!r}")
    given = extra.get(WEIGHTS)
    if given is None:
        given = [1.0 / len(found)] * len(found)
    elif len(given) != len(found) or not all(isinstance(one, int | float) and one >= 0 for one in given):
        raise BadRecord("no_answer", key, f"{WEIGHTS} are {given!r} for {len(found)} answers")
    shares: Counter[str] = Counter()
    for text, weight in zip(found, given, strict=True):
        shares[text.strip()] += weight
    return Asked(_words(question), *zip(*shares.most_common(), strict=True))


def _texts(value: Any) -> Iterator[Any]:
    if isinstance(value, str):
        value = [value]
    for one in value if isinstance(value, Sequence | np.ndarray) else [value]:
        yield one.get("answer") if isinstance(one, Mapping) else one


def _words(question: str) -> str:
    """A question without the mark of its image."""
    return " ".join(question.replace(MARK, " ").split())


class QuestionExamples(RowExamples):
    """Fills rows of batches with questions about images.

    A batch is a dict of arrays over this host's rows:

        pixel_values                   uint8 [b, h, w, 3]
        input_ids, attention_mask      int32 [b, t]               questions
        answer_ids, answer_mask        int32 [b, answers, a]      zeros where there is no further answer
        answer_weights                 float32 [b, answers]
        valid                          bool [b]
        key                            object [b]

    Of a conversation one round is drawn each time it comes.
    """

    NOTHING = Asked("", (), ())

    def __init__(
        self,
        source: Source,
        image_transform: Any,
        tokenizer: Tokenizer,
        kind: Questions,
        *,
        seed: int = 0,
        clean: str = "",
        background: tuple[int, int, int] = (255, 255, 255),
        max_pixels: int = images.MAX_PIXELS,
    ):
        """See `pipeline.TrainData`; `clean` is "blip" for questions as BLIP reads them."""
        reading = {"background": background, "max_pixels": max_pixels}
        super().__init__(source, image_transform, tokenizer, seed=seed, **reading)
        self.kind, self._clean = kind, clean
        self._answers = tokenizer.at_length(kind.answer_length)

    def empty(self, rows: int, chunk: plan.Chunk | None = None) -> Batch:
        """A batch of zeros, every row invalid."""
        tokens, slots = self._tokenizer.max_length, (rows, self.kind.answers)
        return {
            "pixel_values": np.zeros((rows, *self._transform.output_size, 3), np.uint8),
            "input_ids": np.zeros((rows, tokens), np.int32),
            "attention_mask": np.zeros((rows, tokens), np.int32),
            "answer_ids": np.zeros((*slots, self.kind.answer_length), np.int32),
            "answer_mask": np.zeros((*slots, self.kind.answer_length), np.int32),
            "answer_weights": np.zeros(slots, np.float32),
            "valid": np.zeros(rows, bool),
            "key": np.full(rows, "", object),
        }

    def _example(self, index: int, position: int) -> Made:
        record = self.source[index]
        rng = self._generators.at(position)
        asked = self._asked(record, rng)
        (pixels,), size = self._seen((record.image,), record.key, rng)
        weights = np.zeros(self.kind.answers, np.float32)
        weights[: len(asked.weights)] = asked.weights
        return Made({"pixel_values": pixels, "answer_weights": weights}, asked, record.key, size)

    def _asked(self, record: Record, rng: np.random.Generator) -> Asked:
        rounds = asked_in(record.extra, record.key)
        one = rounds[int(rng.integers(len(rounds)))] if len(rounds) > 1 else rounds[0]
        question = blip_question(one.question) if self._clean else one.question
        keep = self.kind.answers
        return Asked(question, one.answers[:keep], one.weights[:keep])

    def _tokenize(self, said: list[Asked], out: Batch) -> int:
        truncated = self._tokens([one.question for one in said], out)
        places = [(row, k) for row, one in enumerate(said) for k in range(len(one.answers))]
        if not places:
            return truncated
        answers, cut = self._answers.encode_rows([said[row].answers[k] for row, k in places])
        at = tuple(np.array(places).T)
        out["answer_ids"][at], out["answer_mask"][at] = answers["input_ids"], answers["attention_mask"]
        return truncated + cut
