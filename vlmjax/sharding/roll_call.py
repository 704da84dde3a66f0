"""Who is there: processes meet at one address before jax does, so that a missing one can be named.

jax's own rendezvous ends a process with a stack trace of C++ when its time is up; nobody learns who was late.
"""

import json
import socket
import time

from vlmjax.errors import UserError

_RETRY_SECONDS = 0.2
# What the others wait beyond process 0, so that its answer and not silence ends their wait.
_PATIENCE_SECONDS = 5.0


def roll_call(coordinator: str, processes: int, process: int, timeout: float | int) -> None:
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
        missing = _listen(host, int(port), processes, deadline)
    else:
        missing = _report(host.strip("[]"), int(port), process, deadline + _PATIENCE_SECONDS)
    if missing is None:
        raise UserError(
            f"process {process}: nobody answered at {coordinator} within {timeout:g} s: expected process 0 "
            f"of {processes} there; check that it runs and that its address is reachable from here"
        )
    if missing:
        names = ", ".join(map(str, missing))
        raise UserError(
            f"process {process}: expected {processes} processes at {coordinator}, saw "
            f"{processes - len(missing)} within {timeout:g} s; missing: {names}; look at their output"
        )


def _listen(host: str, port: int, processes: int, deadline: float) -> list[int]:
    """Collect the others until all are there or time is up, tell them, and return who is missing."""
    callers: dict[int, socket.socket] = {}
    try:
        server = _server(host, port)
    except OSError as error:
        raise UserError(f"process 0 cannot listen on port {port}: {error}; choose a free one") from error
    with server:
        while len(callers) < processes - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
            except OSError:
                continue  # Time is up, or a caller left before we answered.
            number = _number_of(connection, processes)
            if number is None:
                connection.close()
                continue
            if number in callers:  # It was started again while the others were on their way.
                callers[number].close()
            callers[number] = connection
    missing = [number for number in range(1, processes) if number not in callers]
    for connection in callers.values():
        with connection:
            try:
                connection.sendall(json.dumps(missing).encode() + b"\n")
            except OSError:
                continue  # It left; jax's rendezvous will miss it.
    return missing


def _number_of(connection: socket.socket, processes: int) -> int | None:
    """The number a caller gives; None for somebody else who knocked at this port."""
    connection.settimeout(5.0)
    try:
        with connection.makefile("r") as lines:
            number = json.loads(lines.readline(32))
    except (OSError, ValueError):
        return None
    return number if type(number) is int and 0 < number < processes else None


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine can reach the address."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _server(host: str, port: int) -> socket.socket:
    """Listen on every interface, IPv6 and IPv4 where the machine has both, but not beyond a local address."""
    if is_loopback(host):
        return socket.create_server((host, port), backlog=128)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", port), backlog=4096)


def _report(host: str, port: int, process: int, deadline: float) -> list[int] | None:
    """Tell process 0 our number and return whom it misses; None when it never answered."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(json.dumps(process).encode() + b"\n")
                with connection.makefile("r") as lines:
                    return json.loads(lines.readline())
        except (OSError, ValueError):
            time.sleep(_RETRY_SECONDS)  # Not up yet, or it went away: the deadline decides.
    return None
