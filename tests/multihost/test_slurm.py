"""`sbatch launch/slurm.sbatch` on a SLURM cluster of this machine: two tasks train, are killed, stopped, and go on."""

import re
import sys
import time

import numpy as np
import pytest
from training import tiny

from tests.multihost import slurm_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        slurm_cluster.missing() is not None, reason=slurm_cluster.missing() or "there is SLURM"
    ),
]

STEPS, DISTURB = 50, 10


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny.write_recipe(
        tmp_path_factory.mktemp("recipe"), total__steps=STEPS, checkpoint__every__steps=8, data__threads=1
    )


class Job:
    """One `sbatch launch/slurm.sbatch` of two tasks with one simulated device each."""

    def __init__(self, cluster, recipe, folder, dry_run=False, **variables):
        self.cluster, self.workdir, self.log = cluster, folder / "run", folder / "job.out"
        self.number = cluster.call(
            *("sbatch", "--parsable", "--ntasks-per-node=2", "--time=20", f"--output={self.log}"),
            *(str(tiny.ROOT / "launch" / "slurm.sbatch"), *(["--dry-run"] if dry_run else [])),
            *(f"--config={recipe}", f"--workdir={self.workdir}"),
            env=tiny.environment()
            | {"VLMJAX_PYTHON": sys.executable, "VLMJAX_GRACE_SECONDS": "3", **variables},
        )

    def output(self):
        return self.log.read_text() if self.log.exists() else ""

    def until(self, ready):
        """Wait for something that happens while the job runs."""
        looked = time.monotonic()
        while not ready():
            if time.monotonic() > looked + 2:
                state, looked = self.cluster.state(self.number)["JobState"], time.monotonic()
                assert state in ("PENDING", "CONFIGURING", "RUNNING"), f"{state}\n{self.output()}"
            time.sleep(0.02)

    def reached(self, step):
        """Wait until a step is logged."""
        metrics = self.workdir / "metrics.jsonl"
        self.until(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text())

    def ended(self, seconds=400):
        """SLURM's account of the job when it is over."""
        deadline = time.monotonic() + seconds
        while True:
            state = self.cluster.state(self.number)
            if state["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                return state
            assert time.monotonic() < deadline, f"{state}\n{self.output()}"
            time.sleep(0.5)

    def losses(self):
        """The loss of every step, each step once."""
        rows = [row for row in tiny.rows(self.workdir) if "loss" in row]
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        return [row["loss"] for row in rows]


# Counts to 3 over all its tries; in the first it waits for SIGTERM, saves where it is and asks to be started again.
COUNTER = """
import os, pathlib, signal, sys, time
saved = pathlib.Path(os.environ["SAVED"] + os.environ["VLMJAX_PROCESS_ID"])
count = int(saved.read_text()) if saved.exists() else 0
def leave(*_):
    print("SIGTERM", flush=True)
    time.sleep(0.5)  # a second one would be seen
    saved.write_text("2")
    sys.exit(42)
signal.signal(signal.SIGTERM, leave)
print("counts from", count, flush=True)
if not saved.exists():
    saved.with_suffix(".ready").touch()
    time.sleep(300)
"""


@pytest.fixture
def counting(cluster, tmp_path):
    """A job that runs the counter in both tasks, which wait for SIGTERM."""
    (tmp_path / "counter.py").write_text(COUNTER)
    variables = {"VLMJAX_MODULE": "counter", "PYTHONPATH": str(tmp_path), "SAVED": str(tmp_path / "saved")}
    job = Job(cluster, "none", tmp_path, **variables)
    job.until(lambda: len(list(tmp_path.glob("*.ready"))) == 2)
    return job


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, counting, tmp_path):
    cluster.call("scancel", counting.number)
    state = counting.ended()
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0"), counting.output()
    assert "back to the queue" not in counting.output()
    assert len(list(tmp_path.glob("saved[01]"))) == 2


def test_a_recipe_that_cannot_run_is_not_restarted(cluster, tmp_path):
    job = Job(cluster, "none.py", tmp_path)
    state = job.ended()
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "78:0"), job.output()
    assert "exit code 78: not started again" in job.output()


def test_sigterm_reaches_each_task_once_and_the_job_is_requeued(cluster, counting):
    """The signal goes to the batch shell alone, as that of `--signal=B:TERM@...` before a time limit."""
    job = counting
    cluster.call("scancel", "--batch", "--signal=TERM", job.number)
    state = job.ended()
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), job.output()
    for text in ("SIGTERM", "counts from 0", "counts from 2", "ended with exit code 42"):
        assert job.output().count(text) == 2, job.output()
    assert "back to the queue (1 of at most" in job.output() and "starting again" not in job.output()


def test_dry_run_as_a_job_shows_its_nodes(cluster, tmp_path):
    job = Job(cluster, "none", tmp_path, dry_run=True)
    assert job.ended()["JobState"] == "COMPLETED", job.output()
    node = cluster.call("sinfo", "--noheader", "--format=%n")
    assert f"task 0 on {node}: CPU" in job.output() and f"task 1 on {node}: CPU" in job.output()
    assert "-m vlmjax.main --config=none" in job.output()


@pytest.fixture(scope="module")
def undisturbed(cluster, recipe, tmp_path_factory):
    job = Job(cluster, recipe, tmp_path_factory.mktemp("undisturbed"))
    assert job.ended()["JobState"] == "COMPLETED", job.output()
    assert "2 cpu device(s) in 2 process(es)" in job.output()
    assert all(f"[vlmjax] task {i} on " in job.output() for i in range(2))
    return job.losses()


def test_a_killed_task_is_restarted_in_the_job(cluster, recipe, undisturbed, tmp_path):
    job = Job(cluster, recipe, tmp_path)
    job.reached(DISTURB)
    pid = re.search(r"process 1 of 2 on \S+, pid (\d+):", job.output())[1]
    cluster.call("kill", "-KILL", pid)
    state = job.ended()
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "0"), job.output()
    assert "task 1 ended with exit code 137" in job.output()
    assert job.output().count("starting again") == 1
    np.testing.assert_array_equal(job.losses(), undisturbed)


def test_a_stopped_job_is_requeued_and_goes_on(cluster, recipe, undisturbed, tmp_path):
    """The signal goes to the batch shell alone, as that of `--signal=B:TERM@...` before a time limit."""
    job = Job(cluster, recipe, tmp_path)
    job.reached(DISTURB)
    cluster.call("scancel", "--batch", "--signal=TERM", job.number)
    state = job.ended()
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), job.output()
    assert job.output().count("ended with exit code 42") == 2
    assert "back to the queue (1 of at most" in job.output() and "starting again" not in job.output()
    np.testing.assert_array_equal(job.losses(), undisturbed)
