"""Sources to training batches, without end, in an order set by (seed, step)."""

import dataclasses
import os
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlmjax.data import images, loader, plan
from vlmjax.data.loader import Batch, Failure, SkipCounter
from vlmjax.data.sources import Source
from vlmjax.data.text import Tokenizer
from vlmjax.errors import BadRecord, DataError


def caption_id(caption: str) -> int:
    """A 32-bit number of a caption's text; equal captions are positives of each other's images."""
    return zlib.crc32(caption.encode())


def default_threads() -> int:
    """One decoding thread per core this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores)


class TrainData:
    """Endless training batches, each a pure function of (seed, step).

    Row r of step s is example permutation(seed, g // n)[g % n] with g = s * batch_size + r; its caption and
    its augmentation come from a generator keyed by (seed, g). So the global batch is the same for any number
    of hosts and threads, each epoch shows every example once, and starting at a step costs nothing.

    A batch is a dict of arrays over this host's rows: pixel_values uint8 [b, h, w, 3], input_ids and
    attention_mask int32 [b, t], caption_id uint32 [b], valid bool [b], key object [b]. A record that cannot
    be used leaves a row of zero pixels with the empty text and valid False.

    Attributes:
        step: the step of the next batch.
        skips: counts of records that could not be used.
    """

    def __init__(
        self,
        source: Source,
        image_transform: Any,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        rows: range | None = None,
        seed: int = 0,
        start_step: int = 0,
        threads: int | None = None,
        chunk: int = 32,
        max_bad_share: float = 0.01,
        captions: str = "random",
        background: tuple[int, int, int] = (255, 255, 255),
        max_pixels: int = images.MAX_PIXELS,
        cache_decoded: int | None = None,
        cache_bytes: int = 2 << 30,
    ):
        """Set up; nothing is read before the first batch.

        Args:
            source: the examples.
            image_transform: `(uint8 [h, w, c], Generator) -> uint8 [*output_size, 3]` with `output_size`,
                such as augment.TrainTransform.
            tokenizer: see text.load.
            batch_size: of the global batch.
            rows: the rows of the global batch this host supplies; all by default.
            seed: of order, captions and augmentation.
            start_step: step of the first batch.
            threads: that decode; 0 decodes in the caller's thread; None takes one per core, at most 16.
            chunk: rows that a thread does at a time.
            max_bad_share: more unusable records than this share stop the run.
            captions: "random" draws one of an example's captions anew each time, "first" takes the first.
            background: colour behind transparent pixels.
            max_pixels: larger images are refused unread.
            cache_decoded: keep decoded images in memory, scaled down to this shorter side: for data that is
                small and seen many times, where decoding would dominate.
            cache_bytes: bound of that memory.

        Raises:
            DataError: fewer examples than one batch.
        """
        if captions not in ("random", "first"):
            raise DataError(f"captions={captions!r} is neither 'random' nor 'first'")
        if len(source) < batch_size:
            raise DataError(
                f"{source.name} has {len(source)} examples, fewer than one batch of {batch_size}; "
                "lower the batch size"
            )
        self.source, self.batch_size, self.seed, self.step = source, batch_size, seed, start_step
        self.skips = SkipCounter(source.name, max_bad_share)
        self._threads = default_threads() if threads is None else threads
        rows = range(batch_size) if rows is None else rows
        self._plan = plan.Plan(len(source), batch_size, rows, seed, start_step, chunk)
        self._transform, self._tokenizer, self._random = image_transform, tokenizer, captions == "random"
        alpha = getattr(image_transform, "needs_alpha", False)

        def decode(data: bytes | np.ndarray) -> np.ndarray:
            return images.decode(data, background=background, max_pixels=max_pixels, keep_alpha=alpha)

        self._pixels = loader.Pixels(cache_decoded, cache_bytes, decode)
        self._batches: Iterator[tuple[int, Batch, list[Failure]]] | None = None

    def __iter__(self) -> "TrainData":
        """Itself: batches go on from `step`."""
        return self

    def __next__(self) -> Batch:
        """The batch of `step`. Raises DataError when too many records are bad."""
        if self._batches is None:
            plan_ = dataclasses.replace(self._plan, start_step=self.step)
            self._batches = loader.load(plan_, self._empty, self._work, self._threads)
        step, batch, failures = next(self._batches)
        self.step = step + 1
        self.skips.add(len(batch["valid"]), failures)
        return batch

    def _empty(self) -> Batch:
        rows, tokens = len(self._plan.rows), self._tokenizer.max_length
        return {
            "pixel_values": np.zeros((rows, *self._transform.output_size, 3), np.uint8),
            "input_ids": np.zeros((rows, tokens), np.int32),
            "attention_mask": np.zeros((rows, tokens), np.int32),
            "caption_id": np.zeros(rows, np.uint32),
            "valid": np.zeros(rows, bool),
            "key": np.full(rows, "", object),
        }

    def _work(self, chunk: plan.Chunk, out: Batch) -> list[Failure]:
        texts, failures = [""] * len(chunk.indices), []
        places = zip(chunk.positions.tolist(), chunk.indices.tolist(), strict=True)
        for row, (position, index) in enumerate(places):
            made = loader.guarded(self.source, index, lambda i=index, p=position: self._example(i, p))
            if isinstance(made, Failure):
                failures.append(made)
                out["key"][row] = made.key
                continue
            out["pixel_values"][row], texts[row], out["key"][row] = made
            out["caption_id"][row] = caption_id(texts[row])
            out["valid"][row] = True
        for name, value in self._tokenizer(texts).items():
            out[name][:] = value
        return failures

    def _example(self, index: int, position: int) -> tuple[np.ndarray, str, str]:
        """Pixels, caption and key of one example at one position of the run."""
        pixels, record = self._pixels(self.source, index)
        if not record.captions:
            raise BadRecord("no_caption", record.key)
        rng = plan.example_rng(self.seed, position)
        chosen = int(rng.integers(len(record.captions))) if self._random else 0
        return self._transform(pixels, rng), record.captions[chosen], record.key

    def indices(self, step: int) -> np.ndarray:
        """Which examples of the source make the global batch of a step: int64 [batch_size]."""
        first = step * self.batch_size
        return self._plan.indices(np.arange(first, first + self.batch_size))

    @property
    def state(self) -> dict[str, Any]:
        """All that is needed to go on: the step, and what must not have changed meanwhile."""
        return {
            "step": self.step,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "examples": len(self.source),
            "fingerprint": self.source.fingerprint,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, on any number of hosts and threads.

        Raises:
            DataError: the data, the seed or the batch size is not the saved run's, so "the same order" has no
                meaning.
        """
        now = self.state
        changed = [name for name in now if name != "step" and name in state and state[name] != now[name]]
        if changed:
            told = ", ".join(f"{name} was {state[name]!r} and is {now[name]!r}" for name in changed)
            raise DataError(
                f"cannot continue with other data: {told}; undo the change or start a new workdir"
            )
        self.close()
        self.step = int(state["step"])

    def close(self) -> None:
        """Stop decoding ahead; the next batch starts it again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
