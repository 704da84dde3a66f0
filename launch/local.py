"""Several processes of one run on this machine, each with simulated CPU devices, talking over 127.0.0.1.

    python launch/local.py --processes=2 --devices_per_process=4 -- --config=FILE --workdir=DIR

Everything after `--` goes to `python -m vlmjax.main` in every process. It is a pod in miniature: the same
code and the same collectives, without the hardware.
"""

import argparse
import ctypes
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

DONE, REQUEUE, NON_FINITE, BAD_RECIPE, INTERRUPTED = 0, 42, 77, 78, 130
# The same run would end the same way (a loss that is not a number, a recipe that cannot run), or somebody at the
# keyboard wanted it to end. One such process speaks for all: the others only lost a peer.
FINAL = (NON_FINITE, BAD_RECIPE, INTERRUPTED)
NEVER_RESTART = (DONE, *FINAL)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and what follows `--`."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="launch/local.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="exit code: 0 done, 42 stopped in good order and ready to continue, 77 the loss became NaN or "
        "infinite, 78 the recipe cannot run, 130 stopped by Ctrl-C, otherwise that of the first process to fail",
    )
    parser.add_argument("--processes", type=_positive, default=2, help="how many (2)")
    parser.add_argument(
        "--devices_per_process", type=_positive, default=4, help="simulated CPU devices of each (4)"
    )
    parser.add_argument("--module", default="vlmjax.main", help="what `python -m` runs (vlmjax.main)")
    parser.add_argument(
        "--max_restarts",
        type=int,
        default=0,
        help="start all again up to N times after a failure or a 42 (0)",
    )
    parser.add_argument(
        "--grace_seconds",
        type=float,
        default=20.0,
        help="time for the others to end once one has failed (20)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    return parser.parse_args(argv[:cut]), list(argv[cut + 1 :])


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: expected at least 1")
    return number


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def child_variables(process: int, options: argparse.Namespace, port: int) -> dict[str, str]:
    """What one process finds in its environment beyond ours."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\S*", "", os.environ.get("XLA_FLAGS", ""))
    flags += f" --xla_force_host_platform_device_count={options.devices_per_process}"
    return {
        "VLMJAX_COORDINATOR": f"127.0.0.1:{port}",
        "VLMJAX_NUM_PROCESSES": str(options.processes),
        "VLMJAX_PROCESS_ID": str(process),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags.strip(),
        "PYTHONUNBUFFERED": "1",
    }


def device_map(options: argparse.Namespace) -> list[str]:
    """Which of the run's devices each process has, one line per process."""
    each, total = options.devices_per_process, options.processes * options.devices_per_process
    return [
        f"[p{i}] devices {i * each}-{(i + 1) * each - 1} of {total}, simulated on this CPU"
        for i in range(options.processes)
    ]


def die_with_parent() -> None:
    """Have Linux kill this child when we are killed: no half of a run writes on where the next one starts."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        _LIBC.prctl(pr_set_pdeathsig, signal.SIGKILL)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Children:
    """The processes of one attempt."""

    def __init__(self, options: argparse.Namespace, command: Sequence[str]):
        """Start them all."""
        self.ended: queue.Queue[tuple[int, int]] = queue.Queue()
        self.processes: list[subprocess.Popen] = []
        self._readers: list[threading.Thread] = []
        port = free_port()
        for i in range(options.processes):
            child = subprocess.Popen(
                command,
                preexec_fn=die_with_parent,
                env=os.environ | child_variables(i, options, port),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # Out of the terminal's group: a Ctrl-C reaches them once, through us.
                start_new_session=True,
            )
            self.processes.append(child)
            say(f"[p{i}] pid {child.pid}")
        # Only now: a process with threads is not one to fork.
        for i, child in enumerate(self.processes):
            self._readers.append(threading.Thread(target=self._read, args=(i, child), daemon=True))
            self._readers[-1].start()
            threading.Thread(target=self._wait, args=(i, child), daemon=True).start()

    def _read(self, i: int, child: subprocess.Popen) -> None:
        for line in child.stdout:
            say(f"[p{i}] {line.decode(errors='replace').rstrip()}")

    def _wait(self, i: int, child: subprocess.Popen) -> None:
        # A queue filled by one thread per child keeps the order in which they ended: the first is the cause.
        self.ended.put((i, child.wait()))

    def signal(self, number: int) -> None:
        """Send a signal to those that still run."""
        for child in self.processes:
            if child.poll() is None:
                child.send_signal(number)

    def result(self, grace_seconds: float) -> int:
        """Wait for all; when one fails, end the others. Returns 0, a final code, or that of the first to fail."""
        first, deadline, final = DONE, None, DONE
        for _ in self.processes:
            code = self._next(deadline)
            if code in FINAL and final == DONE:
                final = code
            if code != DONE and first == DONE:
                first, deadline = code, time.monotonic() + grace_seconds
                # After 42 the others are on their way out too, each with its part of the same checkpoint.
                if code != REQUEUE:
                    self.signal(signal.SIGTERM)
        for reader in self._readers:
            reader.join(timeout=5.0)  # Not for ever: a grandchild may hold the pipe open.
        return final or first

    def _next(self, deadline: float | None) -> int:
        """Exit code of the next child to end, as a shell gives it; past the deadline the rest are killed."""
        try:
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            i, code = self.ended.get(timeout=timeout)
        except queue.Empty:
            self.signal(signal.SIGKILL)
            i, code = self.ended.get()
        code = 128 - code if code < 0 else code
        if code != DONE:
            say(f"[p{i}] ended with exit code {code}")
        return code


def say(line: str) -> None:
    """One whole line, also when several threads speak."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def run(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Start the processes, again after failures as far as `--max_restarts` allows; returns the exit code."""
    stopped: list[int] = []
    children: list[Children] = []

    def forward(number: int, _frame: object) -> None:
        stopped.append(number)
        if children:
            children[-1].signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    for attempt in range(options.max_restarts + 1):
        children.append(Children(options, command))
        if stopped:  # The signal came while they were starting.
            children[-1].signal(stopped[-1])
        code = children[-1].result(options.grace_seconds)
        if code in NEVER_RESTART or stopped or attempt == options.max_restarts:
            return code
        say(f"exit code {code}: starting again ({attempt + 1} of at most {options.max_restarts})")
    raise AssertionError("the last attempt returns")


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    options, arguments = parse(argv)
    command = [sys.executable, "-m", options.module, *arguments]
    if options.dry_run:
        for i in range(options.processes):
            variables = child_variables(i, options, port=0)
            variables["VLMJAX_COORDINATOR"] = "127.0.0.1:PORT"
            settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
            say(f"[p{i}] {settings} {shlex.join(command)}")
        say("\n".join(device_map(options)))
        return DONE
    say("\n".join(device_map(options)))
    return run(options, command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
