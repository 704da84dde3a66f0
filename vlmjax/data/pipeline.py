"""Sources to training batches, without end, in an order set by (seed, step)."""

import dataclasses
import functools
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmjax.data import images, loader, mixture, plan
from vlmjax.data.captions import Text
from vlmjax.data.examples import Examples, RowExamples
from vlmjax.data.generative import GenerativeExamples, Rows
from vlmjax.data.grouped import GroupedChunks
from vlmjax.data.labelled import LabelledExamples
from vlmjax.data.labels import Classes
from vlmjax.data.loader import Batch, SkipCounter
from vlmjax.data.mixture import Mixture
from vlmjax.data.packed import PackedChunks
from vlmjax.data.questions import QuestionExamples, Questions
from vlmjax.data.record import Record
from vlmjax.data.sources import Source, together
from vlmjax.data.statements import StatementExamples, Statements
from vlmjax.data.text import Tokenizer
from vlmjax.data.windows import BEGINNING, Place
from vlmjax.errors import DataError

_log = logging.getLogger(__name__)
_LOOK_AHEAD = 64  # batches; a remote shard takes seconds to come

# What makes the rows of each kind, and which settings of captions it takes.
KINDS: dict[type, tuple[Any, tuple[str, ...]]] = {
    type(None): (Examples, ("captions", "templates", "cache_decoded", "cache_bytes", "image_ids")),
    Rows: (GenerativeExamples, ("captions", "templates")),
    Questions: (QuestionExamples, ()),
    Statements: (StatementExamples, ()),
    Classes: (LabelledExamples, ("cache_decoded", "cache_bytes")),
}


@dataclasses.dataclass
class _Work:
    """What decoding took since it was last asked."""

    batches: int = 0
    records: int = 0
    seconds: float = 0.0
    bytes: int = 0
    truncated: int = 0

    def add(self, done: loader.Done) -> None:
        self.batches += 1
        self.records += done.records
        self.seconds += done.seconds
        self.bytes += done.bytes_read
        self.truncated += done.truncated


def default_threads() -> int:
    """One decoding thread per core this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores)


class TrainData:
    """Endless training batches, each a pure function of (seed, step).

    Row r of step s is the example that the mixture puts at g = s * batch_size + r; its caption and its
    augmentation come from a generator keyed by (seed, g). So the global batch is the same for any number of
    hosts, threads and processes, each epoch of a source shows every example once, and starting at a step costs
    nothing.

    A batch is a dict of arrays over this host's rows: pixel_values uint8 [b, h, w, 3], input_ids and
    attention_mask int32 [b, t], caption_id uint32 [b], valid bool [b], key object [b]. A record that cannot
    be used leaves a row of zero pixels with the empty text and valid False. With another `kind`, rows hold
    conversations, questions, statements or labels: see `generative.GenerativeExamples`, `questions.QuestionExamples`,
    `statements.StatementExamples`, `labelled.LabelledExamples`. Where conversations are packed, a row of step s is one
    of the rows that windows of examples were packed into, in their order, and "the example at g" counts through the
    windows; where they are grouped by length, likewise with batches for rows, whose shapes differ.

    Attributes:
        step: the step of the next batch.
        skips: counts of records that could not be used.
        source: all sources, one after the other.
        mixture: which example stands at which position.
    """

    def __init__(
        self,
        source: Source | Sequence[Source],
        image_transform: Any,
        tokenizer: Tokenizer | None,
        *,
        batch_size: int,
        shares: Sequence[float] = (1.0,),
        rows: range | None = None,
        seed: int = 0,
        start_step: int = 0,
        threads: int | None = None,
        processes: int = 0,
        chunk: int = 32,
        max_bad_share: float = 0.01,
        captions: str = "random",
        templates: str | Sequence[str] = (),
        clean: str = "",
        background: tuple[int, int, int] = (255, 255, 255),
        max_pixels: int = images.MAX_PIXELS,
        cache_decoded: int | None = None,
        cache_bytes: int = 2 << 30,
        image_ids: bool = False,
        kind: Rows | Questions | Statements | Classes | None = None,
    ):
        """Set up; nothing is read before the first batch.

        Args:
            source: the examples, or several sources to mix.
            image_transform: `(uint8 [h, w, c], Generator) -> uint8 [*output_size, 3]` with `output_size`,
                such as augment.TrainTransform.
            tokenizer: see text.load; None where rows have no text.
            batch_size: of the global batch.
            shares: the part of all rows that each source supplies; see mixture.shares.
            rows: the rows of the global batch this host supplies; all by default.
            seed: of order, captions and augmentation.
            start_step: step of the first batch.
            threads: that decode; 0 decodes in the caller's thread; None takes one per core, at most 16.
            processes: that decode, sharing the threads among them; 0 decodes in this process, which is cheaper
                until one process cannot keep up.
            chunk: rows that a thread does at a time.
            max_bad_share: more unusable records than this share stop the run.
            captions: which of an example's captions, anew each time: see captions.CaptionRule.
            templates: sentences around the caption, one drawn each time: "a photo of {caption}".
            clean: how captions are tidied before: see captions.CaptionRule.
            background: colour behind transparent pixels.
            max_pixels: larger images are refused unread.
            cache_decoded: keep decoded images in memory, scaled down to this shorter side: for data that is
                small and seen many times, where decoding would dominate.
            cache_bytes: bound of that memory, of all processes together.
            image_ids: also give uint32 `image_id`, equal where images are.
            kind: what rows are that hold no pair of an image and a text, for which it is None. The cache is for
                pairs and labelled images.

        Raises:
            DataError: fewer examples than one batch, or the same data in two sources.
        """
        images.backend()  # compiles the resize kernel where that was never done, before anything waits for it
        sources = list(source) if isinstance(source, Sequence) else [source]
        self.source = together(sources)
        if len(self.source) < batch_size:
            raise DataError(
                f"{self.source.name} has {len(self.source)} examples, fewer than one batch of {batch_size}; "
                "lower the batch size"
            )
        self.batch_size, self.seed, self.step = batch_size, seed, start_step
        self.skips = SkipCounter(self.source.name, max_bad_share)
        self.mixture = Mixture(mixture.parts_of(sources, shares), seed)
        self._threads = default_threads() if threads is None else threads
        self._processes = processes
        self._rows = range(batch_size) if rows is None else rows
        self._chunk = chunk
        settings = {
            "seed": seed,
            "captions": captions,
            "templates": templates,
            "clean": clean,
            "background": background,
            "max_pixels": max_pixels,
            "cache_decoded": cache_decoded,
            "cache_bytes": cache_bytes // max(1, processes),
            "image_ids": image_ids,
        }
        made, names = KINDS[type(kind)]
        if cache_decoded and "cache_decoded" not in names:
            raise DataError(
                f"cache_decoded={cache_decoded} is for pairs of an image and a text; leave it out"
            )
        own = {name: settings[name] for name in ("seed", "clean", "background", "max_pixels", *names)}
        given = (self.source, image_transform, tokenizer, *([] if kind is None else [kind]))
        self._examples: RowExamples | GenerativeExamples = made(*given, **own)
        windowed = isinstance(kind, Rows) and (kind.packing or kind.lengths)
        self._windowed = kind if windowed else None  # what batches are made of windows of examples
        # Where `step` begins, of such batches; not known when a run is begun late, then it is added up.
        self._place = BEGINNING if start_step == 0 else None
        self._batches: loader.Batches | None = None
        self._work, self._asked = _Work(), start_step
        self._far = hasattr(self.source, "prepare") and any(
            part.ends is not None for part in self.mixture.parts
        )

    def __iter__(self) -> "TrainData":
        """Itself: batches go on from `step`."""
        return self

    def __next__(self) -> Batch:
        """The batch of `step`. Raises DataError when too many records are bad."""
        if self._batches is None:
            make = functools.partial(self._examples.empty, len(self._rows))
            self._batches = loader.Batches(
                self._plan(), make, self._examples.fill, self._threads, self._processes
            )
        self._prepare()
        step, batch, done = next(self._batches)
        self.step, self._place = step + 1, done.after
        self._work.add(done)
        self.skips.add(done.records, done.failures)
        return batch

    def _plan(self) -> plan.Plan | PackedChunks | GroupedChunks:
        if self._windowed is None:
            return plan.Plan(self.mixture, self.batch_size, self._rows, self.step, self._chunk)
        return self._windowed_plan(self._windowed)

    def _windowed_plan(self, rows: Rows) -> PackedChunks | GroupedChunks:
        where = (self.step, self._chunk, self._place or BEGINNING)
        host = (self.batch_size, self._rows, self.seed, rows.window)
        given = (self.mixture, self._examples.measure)
        if rows.packing:
            return PackedChunks(*given, rows.max_length, rows.images_per_row, *host, *where)
        return GroupedChunks(*given, rows.lengths, *host, *where)

    def _begins(self) -> Place:
        """Where the next step begins, of packed or grouped rows."""
        if self._place is None:
            self._place = self._plan().place(self.step)
        return self._place

    def _prepare(self) -> None:
        """Tell a source of remote shards which examples come next, some batches ahead."""
        if not self._far or self.step < self._asked:
            return
        if self._windowed is not None:  # windows are read whole, for their lengths
            first = self._begins().window * self._windowed.window
            positions = np.arange(first, first + 2 * self._windowed.window, dtype=np.int64)
        else:
            steps = np.arange(self.step, self.step + _LOOK_AHEAD, dtype=np.int64)
            rows = np.arange(self._rows.start, self._rows.stop, dtype=np.int64)
            positions = (steps[:, None] * self.batch_size + rows).ravel()
        # All that is ahead, not what is new: what is named again is not put out of the cache.
        self.source.prepare(self.mixture(positions).tolist())
        self._asked = self.step + _LOOK_AHEAD // 4

    def indices(self, step: int) -> np.ndarray:
        """Which examples of `source` make the global batch of a step: int64 [batch_size].

        A step before this mixture began counts as its first one.

        Raises:
            DataError: rows are packed or grouped, so that steps do not follow the mixture.
        """
        if self._windowed is not None:
            raise DataError(
                "rows are packed or grouped: which examples a step holds is known once it is made"
            )
        return self._plan().indices(max(step, -(-self.mixture.start // self.batch_size)))

    def text(self, record: Record, step: int, row: int) -> Text:
        """The caption that a record has in a row of the global batch of a step, and the text made of it.

        Raises:
            BadRecord: it has none.
            DataError: rows are of another kind.
        """
        if not isinstance(self._examples, Examples):
            raise DataError("rows are no pairs of an image and a text")
        return self._examples.text(record, step * self.batch_size + row)

    def work(self) -> dict[str, int | float]:
        """Since the last call: batches, records, seconds of all threads, bytes read; and the batches that wait now."""
        out, self._work = dataclasses.asdict(self._work), _Work()
        if self._batches is not None:
            out["queue"] = self._batches.waiting()
        return out

    @property
    def state(self) -> dict[str, Any]:
        """All that is needed to go on: the step, and what must not have changed meanwhile."""
        out = {
            "step": self.step,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "mixture": self.mixture.state(),
            "images": images.backend(),
        }
        if self._windowed is not None:
            out["packed"] = {"place": list(self._begins()), **self._packed_by()}
        return out

    def _packed_by(self) -> dict[str, Any]:
        """What packing or grouping depends on, but for the data: the same rows come only of the same numbers."""
        out = {name: getattr(self._windowed, name) for name in ("max_length", "images_per_row", "window")}
        return out if self._windowed.packing else {**out, "lengths": list(self._windowed.lengths)}

    def restore(self, state: dict[str, Any], *, accept: bool = False) -> None:
        """Go on from a saved state, on any number of hosts, threads and processes.

        Args:
            state: from `state`.
            accept: other sources or shares than the saved run's are its next mixture, from this step on; sources
                of both go on where they were.

        Raises:
            DataError: the data, the seed or the batch size is not the saved run's, so "the same order" has no
                meaning.
        """
        missing = [name for name in ("step", "seed", "batch_size", "mixture") if name not in state]
        if missing:
            raise DataError(
                f"the checkpoint does not say where its data stood ({', '.join(missing)} missing): it is damaged or of "
                "an older vlmjax; start a new workdir"
            )
        was = {"packed": None, **state}
        now = {"seed": self.seed, "batch_size": self.batch_size, "packed": None, "images": images.backend()}
        if self._windowed is not None:
            now["packed"] = {"place": (was["packed"] or {}).get("place"), **self._packed_by()}
        changed = [
            f"{name} was {was[name]!r} and is {now[name]!r}"
            for name in ("seed", "batch_size", "packed")
            if was[name] != now[name]
        ]
        if changed:
            raise DataError(f"cannot continue: {', '.join(changed)}; undo the change or start a new workdir")
        before, today = state.get("images"), now["images"]
        if before and before != today:
            _log.warning(
                "pictures were made by %s and are now by %s: their last bits may differ", before, today
            )
        saved, step = Mixture.from_state(state["mixture"], self.seed), int(state["step"])
        place = Place(*was["packed"]["place"]) if was["packed"] else None
        self.mixture, place = self._continued(saved, step, place, accept)
        self.close()
        self.step = self._asked = step
        self._place = place

    def _continued(
        self, saved: Mixture, step: int, place: Place | None, accept: bool
    ) -> tuple[Mixture, Place | None]:
        """The mixture to go on with, the saved one or the next, and where it does so, of packed rows."""
        mine, theirs = (
            [(part.fingerprint, part.size, part.share, part.layout) for part in one.parts]
            for one in (self.mixture, saved)
        )
        if mine == theirs:
            parts = [
                dataclasses.replace(part, stream=old.stream, drawn=old.drawn)
                for part, old in zip(self.mixture.parts, saved.parts, strict=True)
            ]
            return Mixture(parts, self.seed, saved.start, saved.version, saved.streams), place
        told = mixture.difference(saved.parts, self.mixture.parts)
        if not accept:
            raise DataError(
                f"cannot continue with other data: {told}; undo the change, start a new workdir, or go on with the "
                "new mixture from here by --config.data.accept_new_mixture=True"
            )
        _log.warning("from step %d on another mixture: %s", step, told)
        if place is None:
            return saved.followed_by(self.mixture.parts, step * self.batch_size), None
        # A window is packed of one mixture: what is left of the one under way is given up.
        window = place.window + (place.unit > 0)
        return saved.followed_by(self.mixture.parts, window * self._windowed.window), Place(step, window, 0)

    def close(self) -> None:
        """Stop decoding ahead; the next batch starts it again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
