"""Images and texts of a source through both towers, on every device of a mesh and from every process."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from vlmjax.data.images import decode
from vlmjax.errors import BadRecord, DataError
from vlmjax.models.clip import ClipVision
from vlmjax.models.vit import class_state
from vlmjax.ops.pixels import normalized
from vlmjax.sharding.activations import on_mesh
from vlmjax.sharding.mesh import batch_shards, local_rows, replicated, to_global

_log = logging.getLogger(__name__)
# Decoded evaluation images up to this size stay in memory between runs of one evaluator.
CACHE_BYTES = 1 << 29
Describe = Callable[[Any], dict[str, Any]]


class Embedded(NamedTuple):
    """What a pass over a source gave.

    Attributes:
        features: float32 [used, width] in source order, L2-normalised where they are embeddings.
        notes: for each used record what `describe` said of it, with `index` (in the source) and `key`.
        skipped: for each record that could not be used, `index`, `key`, `reason` and `detail`.
    """

    features: np.ndarray
    notes: list[dict[str, Any]]
    skipped: list[dict[str, Any]]


class Batch(NamedTuple):
    """One host batch: pixels uint8 [rows, height, width, 3], and what is known of each row (None: pad)."""

    pixels: np.ndarray
    rows: list[dict[str, Any] | None]


class Embedder:
    """The towers of a dual encoder as two compiled functions; each compiles once per shape of batch.

    Rows are split over the mesh's batch axes; each process reads and decodes only the rows of its own
    devices, and every process receives the embeddings of all rows.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        transform: Any,
        mesh: jax.sharding.Mesh,
        image_features: Callable[[Any, jax.Array], jax.Array] | None = None,
    ):
        """`tokenizer` and `transform` are the model's own, as `vlmjax.hub.load_processor` gives them.

        `image_features`: what images become, of a bound model; by default the embedding that texts are compared with.
        """
        self.tokenizer, self.transform, self.mesh = tokenizer, transform, mesh

        @on_mesh(mesh)
        def images(params: Any, pixels: jax.Array) -> jax.Array:
            values = normalized(pixels, transform.mean, transform.std)
            return model.apply({"params": params}, values, method=image_features or embed_image).astype(
                jnp.float32
            )

        @on_mesh(mesh)
        def texts(params: Any, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
            out = model.apply({"params": params}, input_ids, attention_mask, method=text_features)
            return out.astype(jnp.float32)

        self._images = jax.jit(images, out_shardings=replicated(mesh))
        self._texts = jax.jit(texts, out_shardings=replicated(mesh))

    def rows_per_batch(self, wanted: int, available: int) -> int:
        """The batch size used: `wanted` or what is there, rounded up to a multiple of the batch shards."""
        shards = batch_shards(self.mesh)
        return -(-max(1, min(wanted, available)) // shards) * shards

    def images(self, params: Any, batches: Iterable[Batch], batch_size: int) -> Embedded:
        """Embed host batches of `batch_size` global rows (see `read_batches`), all processes in step."""
        parts, own = [], []
        for batch in batches:
            pixels = to_global({"pixels": batch.pixels}, self.mesh, batch_size)["pixels"]
            parts.append(self._images(params, pixels))
            own.append(batch.rows)
        # One gather at the end: a process knows the keys and captions of its own rows only.
        rows = _interleave(gather([local_rows(self.mesh, batch_size).start, own]))
        features = np.concatenate([np.asarray(part) for part in parts])
        used = [at for at, row in enumerate(rows) if row is not None and "reason" not in row]
        skipped = [row for row in rows if row is not None and "reason" in row]
        return Embedded(features[np.array(used, np.int64)], [rows[at] for at in used], skipped)

    def texts(self, params: Any, texts: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed texts known to every process: float32 [texts, width], L2-normalised."""
        size = self.rows_per_batch(batch_size, len(texts))
        own = local_rows(self.mesh, size)
        parts = []
        for start in range(0, len(texts), size):
            part = list(texts[start : start + size])
            part += [part[-1]] * (size - len(part))
            tokens = self.tokenizer(part)
            local = {name: tokens[name][own.start : own.stop] for name in ("input_ids", "attention_mask")}
            batch = to_global(local, self.mesh, size)
            parts.append(self._texts(params, batch["input_ids"], batch["attention_mask"]))
        return np.concatenate([np.asarray(part) for part in parts])[: len(texts)]


def embed_image(model: Any, pixels: jax.Array) -> jax.Array:
    """Of a bound model, in the space where images and texts are compared, into which BLIP projects its states."""
    out = model.encode_image(pixels)
    return model.embed_image(out) if hasattr(model, "embed_image") else out


def tower_state(model: Any, pixels: jax.Array) -> jax.Array:
    """Of a bound model, the state that its image tower ends in, before any projection."""
    return class_state(model(pixels) if isinstance(model, ClipVision) else model.vision_model(pixels))


def text_features(model: Any, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """Likewise of texts."""
    out = model.encode_text(input_ids, attention_mask)
    return model.embed_text(out) if hasattr(model, "embed_text") else out


def read_batches(
    source: Any,
    indices: Sequence[int],
    rows: range,
    batch_size: int,
    transform: Any,
    describe: Describe,
    *,
    pictures: Callable[[Any], Sequence[Any]] | None = None,
    slots: int = 0,
    threads: int = 4,
) -> Iterator[Batch]:
    """Read this process's `rows` of each global batch of `batch_size`, in order, two batches ahead.

    Position p of the pass reads `source[indices[p]]`; positions past the end are padding. A record that
    cannot be read or decoded, or that `describe` refuses, keeps its row, as zeros with a `reason`.

    Args:
        describe: record -> what to remember of it (JSON values); raises BadRecord to leave it out.
        pictures: record -> its images, as many as `slots`: pixels are [slots, height, width, 3] then; None: its one.
        slots: see `pictures`.
        threads: records read and decoded at a time.
    """
    if transform.output_size is None:
        raise DataError("the model's image preprocessing sets no crop size: its images cannot form a batch")
    shape = (*([slots] if slots else []), *transform.output_size, 3)
    starts = range(0, len(indices), batch_size)

    def one(position: int) -> tuple[np.ndarray | None, dict[str, Any] | None]:
        if position >= len(indices):
            return None, None
        return _read(source, indices[position], transform, describe, pictures)

    with ThreadPoolExecutor(max(1, threads)) as pool:

        def submit(start: int) -> list[Future]:
            return [pool.submit(one, start + row) for row in rows]

        ahead = [submit(start) for start in starts[:2]]
        for number in range(len(starts)):
            results = [future.result() for future in ahead.pop(0)]
            if number + 2 < len(starts):
                ahead.append(submit(starts[number + 2]))
            pixels = np.zeros((len(rows), *shape), np.uint8)
            for row, (image, _) in enumerate(results):
                if image is not None:
                    pixels[row] = image
            yield Batch(pixels, [note for _, note in results])


def _read(
    source: Any, index: int, transform: Any, describe: Describe, pictures: Any
) -> tuple[np.ndarray | None, dict[str, Any]]:
    key = ""
    try:
        record = source[index]
        key = record.key
        note = describe(record)
        found = pictures(record) if pictures else (record.image,)
        images = [transform(decode(image, background=transform.background)) for image in found]
    except BadRecord as error:
        return None, {"index": index, "key": error.key or key, "reason": error.reason, "detail": error.detail}
    return np.stack(images) if pictures else images[0], {"index": index, "key": key, **note}


def tell_skipped(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Log the first records that an evaluation could not use, by `key`, `reason` and `detail`."""
    for row in rows[:20]:
        _log.warning("%s: skipped %s: %s %s", name, row["key"], row["reason"], row["detail"])


def gather(value: Any) -> list[Any]:
    """The JSON value of every process, in process order, on every process."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array([len(data)], np.int32))).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    everyone = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [json.loads(row[:length].tobytes()) for row, length in zip(everyone, lengths, strict=True)]


def _interleave(processes: list[list]) -> list:
    """(first row, rows by batch) of each process -> all rows in global order.

    A process holds a contiguous part of every batch; processes that share a part have read the same rows.
    """
    parts = [batches for _, batches in sorted(dict(processes).items())]
    return [row for batch in zip(*parts, strict=True) for rows in batch for row in rows]
