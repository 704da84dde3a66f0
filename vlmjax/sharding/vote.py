"""Processes of one run tell each other what they found, on the host: no device waits, and who is silent is named."""

import itertools
import sys
import time
from typing import NoReturn

import jax
from jax._src import (
    distributed,
)  # The coordination service has no public name; its keys are only ever set once.

from vlmjax.errors import PEER_LOST
from vlmjax.sharding import peers

SECONDS = 600.0
# A process that is already overdue gets this long, so that one timeout and not one each ends the wait.
_OVERDUE_MS = 200

_round = itertools.count()


def exchange(topic: str, value: str, seconds: float = SECONDS) -> list[str]:
    """What every process said about a topic, in their order; all of them call this, equally often.

    Where others say nothing in time, or cannot be asked, this process says who and ends at once with exit code 75: an
    exception would pass clean-up that waits for them, and so would an orderly exit.

    Args:
      topic: what it is about, for the message of a timeout.
      value: what this process says.
      seconds: how long the others may take longer than this one.
    """
    if jax.process_count() == 1:
        return [value]
    client, prefix = distributed.global_state.client, f"vlmjax/{next(_round)}"
    client.key_value_set(f"{prefix}/{jax.process_index()}", value)
    deadline, said, missing = time.monotonic() + seconds, [], []
    for process in range(jax.process_count()):
        left = int(1000 * (deadline - time.monotonic()))
        try:
            said.append(client.blocking_key_value_get(f"{prefix}/{process}", max(left, _OVERDUE_MS)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                reason = " ".join(str(error).split())
                _lost(f"{topic}: the processes of this run cannot be asked: {reason}")
            missing.append(process)
    if missing:
        names = ", ".join(map(str, missing))
        _lost(
            f"{topic}: process {jax.process_index()} waited {seconds:g} s for process {names} of "
            f"{jax.process_count()}; look at its output, and at its access to the storage"
        )
    return said


def _lost(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    peers.leave(PEER_LOST)


def first_says(topic: str, value: str, seconds: float = SECONDS) -> str:
    """What process 0 says, on every process; the others' values are not looked at."""
    return exchange(topic, value, seconds)[0]
