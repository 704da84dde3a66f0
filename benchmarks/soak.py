"""A run of two processes that is stopped, killed, stalled and damaged at random, and ends as if nothing had been.

`python benchmarks/soak.py` trains a tiny CLIP for 200 steps under launch/local.py, first undisturbed, then with a fault
every few steps; `--short` is one of each kind in a few minutes. `--seed` draws the faults and when they are due; where
exactly they strike is the machine's doing, and printed. It ends with 1 unless both runs logged the same losses and
gradient norms bit for bit, and saved the same parameters.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from etils import epath

from vlmjax.training import attempts, records
from vlmjax.training.reading import steps_in

ROOT = Path(__file__).resolve().parents[1]
WATCHDOG, PATIENCE = 20, 180  # seconds
ENVIRONMENT = {
    "VLMJAX_HEARTBEAT": "10",
    "PYTHONPATH": str(ROOT),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # a start is mostly the compiling of small programs here
}
RECIPE = """from configs import clip_vitb32
from vlmjax import config


def get_config(arg=""):
    c = clip_vitb32.get_config("tiny")
    c.batch_size = 32
    c.total.steps = {steps}
    c.log_every = 1
    c.checkpoint.every.steps = {every}
    c.mesh.fsdp = 2
    c.watchdog = {watchdog}
    c.data.threads = 1
    c.evals, c.export = config.Config(), False
    return c
"""


class Soaked:
    """A run under the launcher: its processes, its output, how far its present attempt has come."""

    def __init__(self, recipe: Path, workdir: Path):
        """Name a run; `start` begins or continues it."""
        self.recipe, self.workdir, self.checkpoints = recipe, workdir, workdir / "checkpoints"
        self.attempt, self.step, self.steps = 0, 0, 0
        self.pids: dict[int, int] = {}
        self.codes: list[int] = []
        self.output: list[str] = []

    def start(self) -> None:
        """Start the launcher, which starts the processes again whenever one ends."""
        command = [sys.executable, ROOT / "launch" / "local.py", "--processes=2", "--devices_per_process=2"]
        command += ["--max_restarts=1000", "--grace_seconds=5", "--"]
        command += [f"--config={self.recipe}", f"--workdir={self.workdir}"]
        self.launcher = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self.launcher.stdout,), daemon=True)
        self._reader.start()

    def _read(self, lines: object) -> None:
        for line in lines:
            self.output.append(line)
            if found := re.match(r"\[p(\d)\] pid (\d+)", line):
                if found[1] == "0":
                    self.attempt, self.steps, self.pids = self.attempt + 1, 0, {}
                self.pids[int(found[1])] = int(found[2])
            elif found := re.match(r"\[p0\] step (\d+)/", line):
                self.step, self.steps = int(found[1]), self.steps + 1
            elif found := re.match(r"\[p\d\] ended with exit code (\d+)", line):
                self.codes.append(int(found[1]))

    def until(self, ready: Callable[[], bool]) -> bool:
        """Wait for a condition; returns whether it came to be before the launcher ended. A run that is silent fails."""
        seen, deadline = len(self.output), time.monotonic() + PATIENCE
        while not ready():
            if len(self.output) > seen:
                seen, deadline = len(self.output), time.monotonic() + PATIENCE
            if self.launcher.poll() is not None:
                self._reader.join()
                return False
            if time.monotonic() > deadline:
                self.fail(f"nothing happened for {PATIENCE} s")
            time.sleep(0.01)
        return True

    def started_again(self, attempt: int) -> bool:
        """Wait for the next attempt, of a new launcher where the old has ended; False where this was the last."""
        if self.until(lambda: self.attempt > attempt):
            return True
        if self.launcher.returncode == 0:
            return False
        self.start()
        return self.until(lambda: self.attempt > attempt)

    def send(self, process: int, number: int) -> None:
        """A signal to one of the processes, if it is still there."""
        try:
            os.kill(self.pids[process], number)
        except ProcessLookupError:
            print(f"process {process} had ended by itself")

    def fail(self, why: str) -> None:
        """End the soak with what the run wrote last."""
        self.launcher.terminate()
        sys.exit("".join(self.output[-80:]) + f"\nerror: {why}")


def stop(run: Soaked, draw: random.Random) -> str:
    """Asks a process to stop, as a scheduler does."""
    process = draw.randrange(2)
    run.send(process, signal.SIGTERM)
    return f"SIGTERM to process {process}"


def kill_worker(run: Soaked, draw: random.Random) -> str:
    """Kills the process that does not coordinate."""
    run.send(1, signal.SIGKILL)
    return "SIGKILL of process 1"


def kill_coordinator(run: Soaked, draw: random.Random) -> str:
    """Kills the process that coordinates."""
    run.send(0, signal.SIGKILL)
    return "SIGKILL of process 0, the coordinator"


def stall(run: Soaked, draw: random.Random) -> str:
    """Until the other process has left it, or the watchdog of either has struck; then it is woken."""
    process, ended = draw.randrange(2), len(run.codes)
    run.send(process, signal.SIGSTOP)
    began = time.monotonic()
    run.until(lambda: len(run.codes) > ended)
    run.send(process, signal.SIGCONT)
    return f"SIGSTOP of process {process}, given up after {time.monotonic() - began:.0f} s"


def pause(run: Soaked, draw: random.Random) -> str:
    """Shorter than anybody's patience: nothing may come of it."""
    process, attempt = draw.randrange(2), run.attempt
    run.send(process, signal.SIGSTOP)
    time.sleep(3)
    run.send(process, signal.SIGCONT)
    step = run.step
    if run.until(lambda: run.step > step or run.attempt > attempt) and run.attempt > attempt:
        run.fail("a pause of 3 s ended the run")
    return f"SIGSTOP of process {process} for 3 s"


def damage(run: Soaked, draw: random.Random) -> str:
    """Flips a bit of a file of the newest finished checkpoint and kills a process, so that it is read."""
    run.until(lambda: len(steps_in(str(run.checkpoints))) > 1)  # the only one left is nothing to go back from
    newest = run.checkpoints / str(steps_in(str(run.checkpoints))[-1])
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    (path,) = draw.choices(files, [file.stat().st_size for file in files])
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))
    run.send(1, signal.SIGKILL)
    return f"a bit flipped in {path.relative_to(run.checkpoints)}, and SIGKILL of process 1"


def stop_launcher(run: Soaked, draw: random.Random) -> str:
    """Ends the launcher, in good order or not, and starts it again."""
    number = draw.choice([signal.SIGTERM, signal.SIGKILL])
    run.launcher.send_signal(number)
    run.launcher.wait(PATIENCE)
    return f"{number.name} to the launcher, and a new start"


FAULTS = (stop, kill_worker, kill_coordinator, stall, pause, damage, stop_launcher)


def moment(run: Soaked, draw: random.Random, early: bool) -> Callable[[], bool]:
    """When the next fault strikes: some steps into the attempt, or, one time in four, while it starts."""
    steps, seconds, now = draw.randint(1, 12), draw.uniform(0.5, 12), time.monotonic()
    if early and draw.random() < 0.25:
        return lambda: len(run.pids) == 2 and time.monotonic() > now + seconds
    return lambda: run.steps >= steps


def soak(run: Soaked, faults: int, draw: random.Random) -> list[str]:
    """Run to the end through so many faults, each kind equally often; returns what was done, and when."""
    kinds = [FAULTS[i % len(FAULTS)] for i in range(faults)]
    draw.shuffle(kinds)
    done, began = [], time.monotonic()
    run.start()
    for kind in kinds:
        if not run.until(moment(run, draw, early=kind not in (pause, damage))):
            break
        attempt, where = run.attempt, f"at step {run.step}" if run.steps else "while starting"
        what = kind(run, draw)
        done.append(f"{time.monotonic() - began:4.0f} s  start {attempt:2}, {where}: {what}")
        print(done[-1], flush=True)
        if kind is not pause and not run.started_again(attempt):
            break
    run.until(lambda: False)
    return done


def differences(one: Path, other: Path, steps: int) -> list[str]:
    """What two runs of a recipe do not have in common; nothing where each is as the other."""

    def log(workdir: Path) -> list[tuple]:
        rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]

    rows = {run: log(run) for run in (one, other)}
    wrong = [
        f"the log of {run} does not have every step once"
        for run, found in rows.items()
        if [step for step, *_ in found] != list(range(1, steps + 1))
    ]
    if not wrong:
        wrong = [f"{a} is not {b}" for a, b in zip(*rows.values(), strict=True) if a != b]
    saved = [records.read(epath.Path(run) / "checkpoints" / str(steps)) for run in (one, other)]
    wrong += [
        f"{name} was saved with other values"
        for name, x in saved[0]["arrays"].items()
        if x != saved[1]["arrays"][name]
    ]
    return wrong


def table(runs: dict[str, Path]) -> str:
    """Seconds of each phase, side by side."""
    made = {name: attempts.account(attempts.read(run / "attempts.json")) for name, run in runs.items()}
    lines = ["| | " + " | ".join(made) + " |", "|---|" + "---|" * len(made)]
    for phase in next(iter(made.values())):
        lines.append(
            f"| {phase} | " + " | ".join(f"{seconds[phase]:.1f}" for seconds in made.values()) + " |"
        )
    lines.append("| seconds in all | " + " | ".join(f"{sum(s.values()):.1f}" for s in made.values()) + " |")
    lines.append("| goodput | " + " | ".join(f"{attempts.goodput(s):.1%}" for s in made.values()) + " |")
    return "\n".join(lines)


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="60 steps and 7 faults instead of 200 and 14")
    parser.add_argument("--folder", help="empty folder that keeps the runs")
    args = parser.parse_args()
    steps, faults, every = (60, 7, 5) if args.short else (200, 14, 10)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder / "soak_recipe.py"
        recipe.write_text(RECIPE.format(steps=steps, every=every, watchdog=WATCHDOG))
        undisturbed, soaked = (Soaked(recipe, folder / name) for name in ("undisturbed", "soaked"))
        for run in (undisturbed, soaked):
            print(f"{run.workdir.name}: {steps} steps, a checkpoint every {every}", flush=True)
            done = soak(run, faults if run is soaked else 0, random.Random(args.seed))
            if run.launcher.returncode != 0:
                run.fail(f"the run ended with exit code {run.launcher.returncode}")
        aside = sorted(path.name for path in soaked.checkpoints.glob("*.damaged*"))
        print(f"{len(done)} faults, {soaked.attempt} starts, put aside: {', '.join(aside) or 'none'}")
        print(f"exit codes of processes: {' '.join(map(str, soaked.codes))}")
        print(table({run.workdir.name: run.workdir for run in (undisturbed, soaked)}))
        wrong = differences(soaked.workdir, undisturbed.workdir, steps)
        print("\n".join(wrong[:10]) or "the same losses, gradient norms and parameters, bit for bit")
        return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
