"""Two processes of one run, two simulated devices each over gloo, of which either can be sent a signal."""

import socket
import subprocess
import sys
import time
from pathlib import Path

from training import tiny

PROGRAM = Path(__file__).with_name("fault_program.py")
STEPS = 18  # of a whole run
PATIENCE = 900  # seconds in which a run must get anywhere on a machine that has other things to do


class Pair:
    """Both processes of a run; their output lies in `folder`."""

    def __init__(self, folder, recipe, workdir, *arguments, processes=2, devices=4, **env):
        """Start so many processes with so many devices in all, and further variables of the environment."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.workdir, self._outputs, self.processes = Path(workdir), [], []
        folder.mkdir(exist_ok=True, parents=True)
        for i in range(processes):
            variables = {
                "VLMJAX_COORDINATOR": address,
                "VLMJAX_NUM_PROCESSES": str(processes),
                "VLMJAX_PROCESS_ID": str(i),
            }
            self._outputs.append(folder / f"{self.workdir.name}-{i}-{time.time_ns()}.txt")
            with self._outputs[-1].open("w") as output:
                child = subprocess.Popen(
                    [sys.executable, PROGRAM, f"--config={recipe}", f"--workdir={workdir}", *arguments],
                    cwd=tiny.ROOT,
                    env=tiny.environment(devices=devices // processes) | variables | env,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(child)

    def __enter__(self):
        """The pair itself."""
        return self

    def __exit__(self, *_):
        """Nothing outlives its test."""
        for child in self.processes:
            child.kill()
            child.wait()

    def output(self):
        """What both have written so far."""
        return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in self._outputs)

    def steps(self):
        """The steps whose loss is in the log."""
        path = self.workdir / "metrics.jsonl"
        return [row["step"] for row in tiny.rows(self.workdir) if "loss" in row] if path.exists() else []

    def until_step(self, step):
        """Wait until the log has come that far."""
        self.until(lambda: (self.steps() or [0])[-1] >= step)

    def until(self, ready):
        """Wait for a condition while both live."""
        deadline = time.monotonic() + PATIENCE
        while not ready():
            assert all(child.poll() is None for child in self.processes), self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def codes(self, timeout=PATIENCE):
        """Exit codes of both."""
        deadline = time.monotonic() + timeout
        return [child.wait(max(deadline - time.monotonic(), 0.1)) for child in self.processes]


def run(*arguments, code=0, **options):
    """A pair to its end; returns the output."""
    with Pair(*arguments, **options) as pair:
        codes = pair.codes()
        assert codes == [code] * len(codes), pair.output()
        return pair.output()
