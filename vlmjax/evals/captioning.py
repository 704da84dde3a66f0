"""Captions that a model writes about images, against those that people (or the drawn world) wrote."""

import itertools
import os
from collections import Counter
from typing import Any

import jax
import numpy as np

from vlmjax.data.captions import cleaned
from vlmjax.data.sources import open_source
from vlmjax.errors import BadRecord, DataError
from vlmjax.evals import caption
from vlmjax.evals.benchmark import Benchmark, EvalResult, select
from vlmjax.evals.embed import gather, read_batches, tell_skipped
from vlmjax.evals.gallery import spread, square_picture
from vlmjax.evals.writing import Writer, until
from vlmjax.models.blip_inputs import caption_prompt
from vlmjax.sharding.mesh import local_rows

# What papers print of COCO's scores, under names of ours.
_SCORES = {"Bleu_4": "bleu4", "ROUGE_L": "rouge_l", "CIDEr": "cider"}


class CaptionEvaluator:
    """Captions, greedy or by beams: how many are a reference word by word, and COCO's scores (evals/caption.py)."""

    def __init__(
        self,
        benchmark: Benchmark,
        model: Any,
        tokenizer: Any,
        transform: Any,
        mesh: jax.sharding.Mesh,
        *,
        source: Any = None,
        writer: Writer | None = None,
        threads: int = 0,
    ):
        """Open the source. Arguments are those of `pairs.MatchingEvaluator`; `model` is a BlipCaptioner.

        `writer` is shared by evaluators of the same model, so that programs are compiled once.
        """
        self.benchmark, self.transform, self.mesh = benchmark, transform, mesh
        if source is None:
            source = open_source(benchmark.data, image_size=min(transform.output_size or (64,)))
        self.source, self.indices, self.tokenizer = source, select(source, benchmark), tokenizer
        self.writer = writer or Writer(model, transform, mesh)
        self.batch_size = self.writer.rows_per_batch(min(benchmark.batch_size or 64, len(self.indices)))
        config = model.config
        self.prompt = caption_prompt(benchmark.prompt, tokenizer, config)
        self._end, self._pad = config.sep_token_id, config.text.pad_token_id
        self._threads = threads or min(os.cpu_count() or 1, 16)

    def run(self, params: Any, *, details: bool = True) -> EvalResult:
        """Measure a model's parameters (on the mesh). Every process gets the result. Raises DataError for no record."""
        own, notes = local_rows(self.mesh, self.batch_size), []
        batches = read_batches(
            self.source,
            self.indices,
            own,
            self.batch_size,
            self.transform,
            _describe,
            threads=self._threads,
        )
        for number, batch in enumerate(batches):
            tokens = self.writer(
                params,
                [self.prompt] * self.batch_size,
                len(self.prompt),
                batch.pixels,
                self.batch_size,
                max_new_tokens=self.benchmark.max_new_tokens,
                min_new_tokens=self.benchmark.min_new_tokens,
                num_beams=self.benchmark.num_beams,
                ends=(self._end,),
                pad=self._pad,
            )
            for row, note in zip(own, batch.rows, strict=True):
                if note is not None:
                    text = self.tokenizer.decode(until(tokens[row], (self._end,))).strip()
                    notes.append((number * self.batch_size + row, {**note, "written": text}))
        found = dict(
            sorted(itertools.chain(*gather(notes)), key=lambda pair: pair[0])
        )  # processes that share rows have read the same ones
        bad = [note for note in found.values() if "reason" in note]
        tell_skipped(self.benchmark.name, bad)
        used = {place: note for place, note in found.items() if "reason" not in note}
        reasons = dict(Counter(note["reason"] for note in bad))
        if not used:
            raise DataError(f"{self.benchmark.data}: no record could be used ({reasons})")
        counts = {"records": len(found), "used": len(used), "skipped": len(bad)}
        metrics, chance = self._score(used)
        result = EvalResult(self.benchmark.name, "caption", metrics, chance, counts, reasons)
        if details and jax.process_index() == 0:
            result.details = {"samples": self._samples(list(used.values())), "kinds": [], "blind": False}
        return result

    def _score(self, used: dict[int, dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
        exact = np.mean([self._right(note) for note in used.values()])
        references = {place: note["captions"] for place, note in used.items()}
        scores = caption.score(references, {place: note["written"] for place, note in used.items()})
        metrics = {"exact": float(exact)} | {ours: scores[name] for name, ours in _SCORES.items()}
        usual = Counter(note["captions"][0] for note in used.values()).most_common(1)[0][0]
        chance = np.mean([usual in note["captions"] for note in used.values()])
        return metrics, {"exact": float(chance)} | dict.fromkeys(_SCORES.values(), 0.0)

    def _right(self, note: dict[str, Any]) -> bool:
        """Whether what was written is a reference, as training would have shown that."""
        return note["written"] in [cleaned(text, self.benchmark.clean) for text in note["captions"]]

    def _samples(self, used: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Some images with what was written: the same ones every time."""
        chosen = [used[at] for at in spread(len(used))]
        return [
            {
                "image": square_picture(self.source[note["index"]].image, self.transform.background, 96),
                "question": "",
                "expected": note["captions"][0],
                "answer": note["written"],
                "right": self._right(note),
            }
            for note in chosen
        ]


def _describe(record: Any) -> dict[str, Any]:
    if not record.captions:
        raise BadRecord("no_caption", record.key, "the record has an image but no text")
    return {"captions": [text.strip() for text in record.captions]}
