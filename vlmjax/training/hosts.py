"""How the hosts of a run compare: the seconds that each waited for its data and for its devices."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float

from vlmjax.training.phases import Phases
from vlmjax.training.workdir import Workdir

FILE = "hosts.json"
_WAITS = ("data", "step")


class Hosts:
    """Gathers the waits of all processes, line of the log by line, and keeps their sums in hosts.json.

    Steps are collective, so all hosts take equally long over one. Whoever is slow with its data waits for them, and
    all others wait that long for their devices: the straggler has the longest `data` and the shortest `step`.
    """

    def __init__(self, folder: Workdir, phases: Phases):
        """Count from now on."""
        self._folder, self._phases = folder, phases
        self._before = self._waited()
        self._sums = np.zeros((len(_WAITS), jax.process_count()))

    def _waited(self) -> np.ndarray:
        seconds = self._phases.seconds()
        return np.asarray([seconds[name] for name in _WAITS])

    def row(self) -> dict[str, float]:
        """Columns of one line, empty for a process that is alone; called by all processes together.

        For `data` and `step`: `hosts/NAME_seconds` of the median host since the last line, `hosts/NAME_longest`, and
        `hosts/NAME_slowest`, which host that was.
        """
        if jax.process_count() == 1:
            return {}
        now = self._waited()
        mine, self._before = (now - self._before).astype(np.float32), now
        waits = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, len(_WAITS)).T
        self._sums += waits
        if jax.process_index() == 0:
            self._folder.write_json(FILE, {n: s.tolist() for n, s in zip(_WAITS, self._sums, strict=True)})
        return columns(waits)


def columns(waits: Float[np.ndarray, "2 hosts"]) -> dict[str, float]:
    """See `Hosts.row`; `waits` are seconds [data and step, host]."""
    row: dict[str, float] = {}
    for name, seconds in zip(_WAITS, waits, strict=True):
        row[f"hosts/{name}_seconds"] = float(np.median(seconds))
        row[f"hosts/{name}_longest"] = float(seconds.max())
        row[f"hosts/{name}_slowest"] = int(seconds.argmax())
    return row


def slowest_first(sums: Mapping[str, Sequence[float]]) -> list[tuple[int, Any]]:
    """(host, {"data": seconds, "step": seconds}) of hosts.json, those that waited longest for data first."""
    hosts = [
        (i, dict(zip(sums, waits, strict=True))) for i, waits in enumerate(zip(*sums.values(), strict=True))
    ]
    return sorted(hosts, key=lambda host: -host[1]["data"])
