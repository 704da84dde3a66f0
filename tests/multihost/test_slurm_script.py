"""launch/slurm.sbatch: what it does after each exit code. Stand-ins for SLURM's commands run the tasks here."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm.sbatch"

# Runs as many tasks as SLURM_NTASKS, labels their output, and kills the rest when one ends badly, as srun does.
SRUN = """
import os, signal, subprocess, sys, threading, time
command = sys.argv[sys.argv.index("bash"):]
time.sleep(float(os.environ.get("FAKE_DELAY", 0)))
open(os.environ["FAKE"] + "/srun", "a").write(" ".join(sys.argv[1:sys.argv.index("bash")]) + "\\n")
tasks = [subprocess.Popen(command, env=os.environ | {"SLURM_PROCID": str(i)}, stdout=subprocess.PIPE,
         stderr=subprocess.STDOUT, text=True, start_new_session=True) for i in range(int(os.environ["SLURM_NTASKS"]))]
def read(i):
    for line in tasks[i].stdout:
        print(f"{i}: {line}", end="", flush=True)
threads = [threading.Thread(target=read, args=(i,)) for i in range(len(tasks))]
[thread.start() for thread in threads]
open(os.environ["FAKE"] + "/pids", "w").write(" ".join(str(task.pid) for task in tasks))
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):
        [os.killpg(task.pid, signal.SIGKILL) for task in tasks if task.poll() is None]
    time.sleep(0.02)
[thread.join() for thread in threads]
sys.exit(max(code if code >= 0 else 128 - code for code in (task.returncode for task in tasks)))
"""
# A signal to the job's steps reaches every process of every task.
SCANCEL = """
import os, signal, sys
assert sys.argv[1:] == ["--signal=TERM", "7"], sys.argv
for pid in open(os.environ["FAKE"] + "/pids").read().split():
    os.killpg(int(pid), signal.SIGTERM)
"""
SQUEUE = """
import os, sys
if "--steps" in sys.argv:
    print("7.batch" + "\\n7.0" * os.path.exists(os.environ["FAKE"] + "/pids"))
else:
    print(os.environ.get("FAKE_STATE", "RUNNING"))
"""
SCONTROL = """
import os, signal, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("n1\\nn2")
else:
    open(os.environ["FAKE"] + "/scontrol", "a").write(" ".join(sys.argv[1:]) + "\\n")
    os.kill(os.getppid(), signal.SIGKILL)
"""


@pytest.fixture
def job(tmp_path):
    """Starts the script as the batch shell of a job of two tasks that run `source`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in {"srun": SRUN, "scancel": SCANCEL, "squeue": SQUEUE, "scontrol": SCONTROL}.items():
        (folder / name).write_text(f"#!{sys.executable}{body}")
        (folder / name).chmod(0o755)

    def start(source, *arguments, **variables):
        (tmp_path / "program.py").write_text(
            "import os, signal, sys, time\nme = int(os.environ['VLMJAX_PROCESS_ID'])\n"
            f"folder = {str(tmp_path)!r}\ntries = len(open(folder + '/srun').readlines())\n{source}"
        )
        env = {
            name: value for name, value in os.environ.items() if not name.startswith(("VLMJAX_", "SLURM_"))
        }
        env |= {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(tmp_path),
            "FAKE": str(tmp_path),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NTASKS": "2",
            "VLMJAX_GRACE_SECONDS": "1",
            "VLMJAX_MAX_RESTARTS": "1",
            "VLMJAX_PYTHON": sys.executable,
            "VLMJAX_MODULE": "program",
        }
        return subprocess.Popen(
            ["bash", SCRIPT, *arguments],
            env=env | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
        )

    start.srun = lambda: (tmp_path / "srun").read_text().split()
    start.ran = lambda: len((tmp_path / "srun").read_text().splitlines())
    start.requeued = lambda: (tmp_path / "scontrol").exists()
    return start


def ended(process):
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_every_task_knows_its_place_and_gets_the_arguments(job):
    code, output = ended(
        job(
            "print(me, os.environ['VLMJAX_NUM_PROCESSES'], os.environ['VLMJAX_COORDINATOR'], sys.argv[1:])",
            "--config=a b",
            "--workdir=c",
            SLURM_CPUS_PER_TASK="12",
        )
    )
    assert code == 0 and job.ran() == 1
    assert "--cpus-per-task=12" in job.srun() and "--gpu-bind=none" not in job.srun()
    for i in range(2):
        assert f"{i}: {i} 2 n1:61552 ['--config=a b', '--workdir=c']" in output
    assert "task 0 on n1: CPU" in output and "task 1 on n2: CPU" in output


@pytest.mark.parametrize(("code", "runs"), [(75, 2), (76, 2), (134, 2), (1, 2), (77, 1), (78, 1), (130, 1)])
def test_a_failed_task_restarts_all_or_ends_the_job(job, code, runs):
    found, output = ended(job(f"sys.exit({code}) if me == 1 else time.sleep(60)"))
    assert found == code and job.ran() == runs and not job.requeued()
    assert output.count("starting again") == runs - 1
    assert ("not started again" in output) == (code in (77, 78, 130))


def test_a_killed_task_is_started_again_at_another_port(job):
    found, output = ended(
        job(
            """
print(os.environ["VLMJAX_COORDINATOR"], flush=True)
if tries == 1:
    os.kill(os.getpid(), signal.SIGKILL) if me == 1 else time.sleep(60)
"""
        )
    )
    assert found == 0 and job.ran() == 2
    assert "exit code 137: starting again (1 of at most 1)" in output
    assert len(set(re.findall(r"n1:\d+", output))) == 2


def test_what_restarting_cannot_help_outweighs_a_lost_peer(job):
    """srun's own exit code is the highest of its tasks, 137 here, and hides both."""
    found, output = ended(job("time.sleep(0.3 * (1 - me)); sys.exit(75 if me else 77)"))
    assert found == 77 and job.ran() == 1
    assert output.index("task 1 ended with exit code 75") < output.index("task 0 ended with exit code 77")


def test_saved_and_stopped_goes_back_to_the_queue(job):
    found, output = ended(job("sys.exit(42)", SLURM_RESTART_COUNT="3"))
    assert job.requeued() and job.ran() == 1
    assert found == -signal.SIGKILL  # as SLURM ends the shell of a job that it requeues
    assert "back to the queue (4 of at most 1000)" in output


def test_requeueing_is_bounded(job):
    found, output = ended(job("sys.exit(42)", SLURM_RESTART_COUNT="2", VLMJAX_MAX_REQUEUES="2"))
    assert found == 42 and not job.requeued() and "2 times already" in output


def test_a_cancelled_job_stays_cancelled(job):
    found, output = ended(job("sys.exit(42)", FAKE_STATE="COMPLETING"))
    assert found == 42 and not job.requeued() and "the job is COMPLETING" in output


def test_a_signal_that_comes_before_the_tasks_waits_for_them(job):
    process = job("time.sleep(60)", FAKE_DELAY="2.5")
    while "task 1 on n2" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    ended(process)
    assert job.requeued() and time.monotonic() - begun < 20


@pytest.mark.parametrize("code", [42, 75])
def test_the_signal_before_the_time_limit_reaches_each_task_once(job, code):
    """A task that only lost its peer while the others stopped goes back to the queue as well."""
    process = job(
        f"""
def leave(*_):
    print("leaving", flush=True)
    time.sleep(0.5)
    sys.exit({code})
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
time.sleep(60)
"""
    )
    lines = []
    while sum("ready" in line for line in lines) < 2:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, output = ended(process)
    assert output.count("leaving") == 2 and "0: leaving" in output and "1: leaving" in output
    assert job.requeued() and job.ran() == 1


def dry_run(**variables):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("VLMJAX_", "SLURM_"))}
    run = subprocess.run(
        ["bash", SCRIPT, "--dry-run", "--config=a.py:tiny"],
        env=env | variables,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and not run.stderr, run.stderr
    return run.stdout


def test_dry_run_shows_the_command_and_the_map_without_slurm():
    output = dry_run()
    assert "task 0 on node1: CPU" in output and "task 1" not in output
    assert "python -m vlmjax.main --config=a.py:tiny" in output
    output = dry_run(SLURM_NNODES="2", SLURM_NTASKS_PER_NODE="2", SLURM_GPUS_ON_NODE="4")
    assert "task 3 on node2: GPUs 2-3" in output
    output = dry_run(SLURM_NNODES="2", SLURM_NTASKS_PER_NODE="4", SLURM_GPUS_ON_NODE="4")
    assert "task 6 on node2: GPU 2" in output


def test_directives_ask_for_the_signal_that_the_script_handles():
    directives = re.findall(r"^#SBATCH (\S+)", SCRIPT.read_text(), re.MULTILINE)
    assert "--requeue" in directives and "--open-mode=append" in directives
    assert any(re.fullmatch(r"--signal=B:TERM@\d+", line) for line in directives)
