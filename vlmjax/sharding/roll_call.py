"""Who is there: processes meet at one address before jax does, so that a missing one can be named.

jax's own rendezvous ends a process with a stack trace of C++ when its time is up; nobody learns who was late.
"""

import json
import socket
import time

from vlmjax.errors import UserError

_RETRY_SECONDS = 0.2


def roll_call(coordinator: str, processes: int, process: int, timeout: float) -> None:
    """Return once all `processes` have called this.

    Process 0 listens at `coordinator`, which is free again afterwards; the others report to it.

    Args:
      coordinator: `host:port` of process 0.
      processes: how many are expected.
      process: the number of this one, from 0.
      timeout: seconds after which the missing are given up.

    Raises:
      UserError: not all came in time, on every process that did come, with the numbers of those missing;
        or process 0 could not listen or be reached.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    if process == 0:
        missing = _listen(int(port), processes, deadline)
    else:
        # A little longer than process 0 waits, so that its answer and not silence is what ends the wait.
        missing = _report(host.strip("[]"), int(port), process, deadline + 5.0)
    if missing is None:
        raise UserError(
            f"process {process}: nobody answered at {coordinator} within {timeout:g} s: expected process 0 of "
            f"{processes} there; check that it runs and that its address is reachable from here"
        )
    if missing:
        names = ", ".join(map(str, missing))
        raise UserError(
            f"process {process}: expected {processes} processes at {coordinator}, saw "
            f"{processes - len(missing)} within {timeout:g} s; missing: {names}; look at their output"
        )


def _listen(port: int, processes: int, deadline: float) -> list[int]:
    """Collect the others until all are there or time is up, tell them, and return who is missing."""
    callers: dict[int, socket.socket] = {}
    try:
        server = _server(port)
    except OSError as error:
        raise UserError(f"process 0 cannot listen on port {port}: {error}; choose a free one") from error
    with server:
        while len(callers) < processes - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                connection.settimeout(max(0.1, min(5.0, left)))
                number = json.loads(connection.makefile("r").readline())
            except (OSError, ValueError):
                continue  # Time is up, or somebody else knocked at this port: neither is one of ours.
            if isinstance(number, int) and 0 < number < processes:
                callers[number] = connection
    missing = [number for number in range(1, processes) if number not in callers]
    for connection in callers.values():
        with connection:
            try:
                connection.sendall(json.dumps(missing).encode() + b"\n")
            except OSError:
                continue  # It left; jax's rendezvous will miss it.
    return missing


def _server(port: int) -> socket.socket:
    """Listen on every interface, IPv6 and IPv4 where the machine has both."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", port), backlog=4096)


def _report(host: str, port: int, process: int, deadline: float) -> list[int] | None:
    """Tell process 0 our number and return whom it misses; None when it never answered."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(json.dumps(process).encode() + b"\n")
                return json.loads(connection.makefile("r").readline())
        except (OSError, ValueError):
            time.sleep(_RETRY_SECONDS)  # Not up yet, or it went away: the deadline decides.
    return None
