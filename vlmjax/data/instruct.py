"""Conversations written from captions by a language model: `vlmjax.instruct` is the command.

A language model that sees no picture gets captions (and boxes, where the data has them) and writes one of three kinds
of response: a conversation, a full description, or a question that takes reasoning (LLaVA, Liu et al. 2023, section 3).
Which kind an image gets depends on its key alone. Rows are LLaVA's; started again, `write` goes on where it was.
"""

import collections
import concurrent.futures
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np
from PIL import Image

from vlmjax.data import images, instruct_answers
from vlmjax.data.instruct_answers import Rejected
from vlmjax.data.instruct_models import Answer, Model, Unanswered
from vlmjax.data.instruct_prompts import KINDS, Context, context_of, detail_question, draw, kind_of, messages
from vlmjax.data.pictures.signatures import EXTENSIONS, format_of
from vlmjax.data.record import Record
from vlmjax.data.sources import Source, key_of
from vlmjax.errors import BadRecord, DataError

_MOST_FAILURES = 20  # requests in a row without an answer: the model is not there
_KEPT = 4000  # characters of a rejected response


@dataclass(frozen=True)
class Job:
    """What is written about what.

    Attributes:
        out: the jsonl file; rejects go to `out` + ".rejects", counts to `out` + ".counts".
        kinds: weights of the kinds.
        seed: of the choices that keys make.
        image_folder: where the images of accepted rows are written, "" for nowhere.
        record: a file that gets every response as it came, "" for none.
        workers: requests at a time.
        retry_rejects: ask again where the last answer was rejected.
    """

    out: str
    kinds: Mapping[str, int] = field(default_factory=lambda: dict(KINDS))
    seed: int = 0
    image_folder: str = ""
    record: str = ""
    workers: int = 8
    retry_rejects: bool = False


def parse_kinds(text: str) -> dict[str, int]:
    """Weights from "conversation:58,detail:23,reasoning:77". Raises DataError."""
    out = {}
    for part in filter(None, text.split(",")):
        kind, _, weight = part.partition(":")
        if kind not in KINDS or not weight.isdigit():
            raise DataError(
                f"--kinds={text}: expected such as conversation:58,detail:23,reasoning:77; found {part!r}"
            )
        out[kind] = int(weight)
    if not sum(out.values()):
        raise DataError(f"--kinds={text}: no kind has a weight above 0")
    return out


def write(source: Source, model: Model, job: Job, indices: Iterable[int]) -> dict[str, int]:
    """Ask about every record that is not done yet, and append what came of it.

    Returns:
        counts: "written", "written/KIND", "done before", "bad record/REASON", "rejected/REASON", "unanswered".

    Raises:
        DataError: the model refuses, or many requests in a row get no answer; what came before is kept.
    """
    counts: collections.Counter[str] = collections.Counter()
    done = _done(job.out, counts) | (set() if job.retry_rejects else _done(_rejects(job.out), counts))
    files = {"out": job.out, "rejects": _rejects(job.out), "record": job.record}
    if job.record:
        _cut_half_line(job.record)
    opened = {name: _append(path) for name, path in files.items() if path}
    try:
        with concurrent.futures.ThreadPoolExecutor(job.workers) as pool:
            try:
                _go(pool, model, job, _asked(source, indices, done, counts), opened, counts)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        for file in opened.values():
            file.close()
    with open(job.out + ".counts", "w", encoding="utf-8") as file:
        json.dump(dict(sorted(counts.items())), file, indent=1)
    return dict(counts)


def _go(pool: Any, model: Model, job: Job, asked: Iterator, opened: dict[str, TextIO], counts: Any) -> None:
    failures, any_answer, told = 0, False, ""
    while block := list(itertools.islice(asked, 4 * job.workers)):
        # In order, so that equal runs give equal files; a block is small enough to lose to a kill.
        answers = pool.map(lambda one: _ask(model, one[1], job), block)
        for (record, context), (kind, answer) in zip(block, answers, strict=True):
            if isinstance(answer, Unanswered):
                counts["unanswered"], failures, told = counts["unanswered"] + 1, failures + 1, str(answer)
                if failures >= _MOST_FAILURES:
                    raise DataError(
                        f"no answer to {failures} requests in a row, the last: {answer}; start again when it is back"
                    )
                continue
            failures, any_answer = 0, True
            _take(record, context, kind, answer, job, opened, counts)
    if failures and not any_answer:
        raise DataError(
            f"no answer to any of {failures} requests, the last: {told}; start again when it is back"
        )


def _asked(
    source: Source, indices: Iterable[int], done: set[str], counts: Any
) -> Iterator[tuple[Record, Context]]:
    for i in indices:
        try:
            if key_of(source, i) in done:
                continue
            record = source[i]
            yield record, context_of(record)
        except BadRecord as error:
            counts[f"bad record/{error.reason}"] += 1


def _ask(model: Model, context: Context, job: Job) -> tuple[str, Answer | Unanswered]:
    kind = kind_of(context.key, job.kinds, job.seed)
    try:
        return kind, model(messages(context, kind), context.key, kind)
    except Unanswered as error:
        return kind, error


def _take(
    record: Record,
    context: Context,
    kind: str,
    answer: Answer,
    job: Job,
    opened: dict[str, TextIO],
    counts: Any,
) -> None:
    key = context.key
    if "record" in opened:
        _line(opened["record"], {"id": key, "kind": kind, "response": answer.text, "cut": answer.cut})
    try:
        if answer.cut:
            raise Rejected("cut_off")
        turns = instruct_answers.read(kind, answer.text, detail_question(key, job.seed))
        image = _save(record, job) if job.image_folder else key
    except (Rejected, BadRecord) as error:
        counts[f"rejected/{error.reason}"] += 1
        told = {"reason": error.reason, "detail": error.detail, "response": answer.text[:_KEPT]}
        _line(opened["rejects"], {"id": key, "kind": kind, **told})
        return
    said = instruct_answers.conversation(turns, bool(draw(key, "order", job.seed) % 2))
    _line(opened["out"], {"id": key, "image": image, "kind": kind, "conversations": said})
    counts["written"] += 1
    counts[f"written/{kind}"] += 1


def _save(record: Record, job: Job) -> str:
    """Write the image of a record; its path as seen from the jsonl file."""
    data, ending = record.image, "png"
    if isinstance(data, np.ndarray):
        packed = io.BytesIO()
        Image.fromarray(data).save(packed, "PNG")
        data = packed.getvalue()
    else:
        images.decode(data)  # a row whose image cannot be read is of no use
        ending = EXTENSIONS.get(format_of(data), "img")
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", os.path.splitext(record.key)[0]).strip("._") or "image"
    # Two keys may differ only in what a file name cannot hold.
    path = os.path.join(job.image_folder, f"{name[:100]}-{draw(record.key, 'name'):08x}.{ending}")
    os.makedirs(job.image_folder, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
    return os.path.relpath(path, os.path.dirname(os.path.abspath(job.out)))


def _rejects(out: str) -> str:
    return out + ".rejects"


def _done(path: str, counts: Any) -> set[str]:
    """The keys in a file of an earlier run; a last line that a kill left half written is cut off."""
    if not os.path.exists(path):
        return set()
    keys, end = set(), 0
    try:
        with open(path, "rb+") as file:
            for line in file:
                if line.endswith(b"\n"):
                    keys.add(str(json.loads(line)["id"]))
                    end += len(line)
            file.truncate(end)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a file of this command: {error}; name another with --out") from error
    counts["done before"] += len(keys)
    return keys


def _cut_half_line(path: str) -> None:
    """Cut a last line off that a kill left half written."""
    if os.path.exists(path):
        with open(path, "rb+") as file:
            file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))


def _append(path: str) -> TextIO:
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from error


def _line(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


def write_prompts(source: Source, job: Job, indices: Iterable[int], path: str) -> int:
    """Write the requests alone, as {"id", "kind", "messages"}, for a model that is run elsewhere; how many."""
    number, counts = 0, collections.Counter()
    with open(path, "w", encoding="utf-8") as file:
        for _, context in _asked(source, indices, set(), counts):
            kind = kind_of(context.key, job.kinds, job.seed)
            _line(file, {"id": context.key, "kind": kind, "messages": messages(context, kind)})
            number += 1
    return number
