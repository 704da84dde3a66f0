"""The images of a source through a tower, again and again: for benchmarks that look at every image once."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmjax.errors import DataError
from vlmjax.evals import gallery
from vlmjax.evals.embed import CACHE_BYTES, Describe, Embedded, Embedder, read_batches, tell_skipped
from vlmjax.sharding.mesh import local_rows


class Pictures:
    """Some records of a source, read once while they are few."""

    def __init__(
        self,
        name: str,
        source: Any,
        indices: Sequence[int],
        embedder: Embedder,
        describe: Describe,
        *,
        batch_size: int = 256,
        threads: int = 0,
    ):
        """Nothing is read yet.

        Args:
            name: of the benchmark, for the log.
            source: of records.
            indices: those that take part.
            embedder: the tower.
            describe: record -> what to remember of it (JSON values); raises BadRecord to leave it out.
            batch_size: images at a time, over all devices; rounded up to a multiple of them.
            threads: records read at a time per process; 0 = number of CPU cores, at most 16.
        """
        self.source, self.indices, self.embedder = source, indices, embedder
        self.batch_size = embedder.rows_per_batch(batch_size, len(indices))
        self._name, self._describe = name, describe
        self.threads = threads or min(os.cpu_count() or 1, 16)
        self._cached: list | None = None

    def run(self, params: Any) -> Embedded:
        """All images through the tower; every process gets all of it.

        Raises:
            DataError: no record could be used.
        """
        embedded = self.embedder.images(params, self.batches(), self.batch_size)
        tell_skipped(self._name, embedded.skipped)
        if not embedded.notes:
            raise DataError(
                f"{self.source.name}: none of {len(self.indices)} records could be used ({reasons(embedded)})"
            )
        return embedded

    def counts(self, embedded: Embedded) -> dict[str, int]:
        """How many records there were, took part, and could not."""
        return {
            "records": len(self.indices),
            "used": len(embedded.notes),
            "skipped": len(embedded.skipped),
        }

    def thumbnail(self, index: int, size: int = 72) -> np.ndarray:
        """A small uint8 [height, width, 3] picture of a record of the source."""
        return gallery.square_picture(self.source[index].image, self.embedder.transform.background, size)

    def batches(self) -> Any:
        """Host batches: read, and kept for the next run while they are small."""
        if self._cached is not None:
            return self._cached
        rows = local_rows(self.embedder.mesh, self.batch_size)
        batches = read_batches(
            self.source,
            self.indices,
            rows,
            self.batch_size,
            self.embedder.transform,
            self._describe,
            threads=self.threads,
        )
        height, width = self.embedder.transform.output_size
        total = -(-len(self.indices) // self.batch_size) * len(rows) * height * width * 3
        if total <= CACHE_BYTES:
            self._cached = batches = list(batches)
        return batches


def reasons(embedded: Embedded) -> dict[str, int]:
    """Number of skipped records by reason."""
    return dict(Counter(row["reason"] for row in embedded.skipped))
