"""What a run reports of its data: decoding, reading, what waits, and the records skipped, on every host."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlmjax.data.pipeline import TrainData


def data_row(data: TrainData, seconds: float) -> dict[str, Any]:
    """The columns of one logged line, over the last `seconds`; called by all processes together.

    `data/decode_ms` is the work of the decoding threads per record, `data/megabytes_per_second` what was read encoded,
    `data/truncated_share` the share of texts that were cut, `data/queue` the batches that wait ready:
    each of this process. `skipped` counts the records of all processes that could not be used since the run was
    started; its parts are by reason and, with several sources, by source (both of this process), and by host.
    """
    work = data.work()
    row: dict[str, Any] = {}
    if work["batches"] and seconds > 0:
        row["data/decode_ms"] = 1000 * work["seconds"] / work["records"]
        row["data/megabytes_per_second"] = work["bytes"] / 1e6 / seconds
        row["data/truncated_share"] = work["truncated"] / work["records"]
    if "queue" in work:
        row["data/queue"] = work["queue"]
    skips = data.skips
    skips.report()
    row |= {f"skipped/{reason}": count for reason, count in sorted(skips.by_reason.items())}
    if len(data.mixture.parts) > 1:
        row |= {f"skipped/from/{name}": count for name, count in sorted(skips.by_source.items())}
    hosts = _every_host(skips.skipped)
    if len(hosts) > 1:
        row |= {f"skipped/host/{host}": count for host, count in enumerate(hosts) if count}
    return {"skipped": sum(hosts), **row}


def _every_host(value: int) -> list[int]:
    """A number of every process, by its index."""
    if jax.process_count() == 1:
        return [value]
    return np.ravel(multihost_utils.process_allgather(np.asarray(value, np.int32))).tolist()
