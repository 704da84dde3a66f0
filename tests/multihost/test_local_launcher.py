"""launch/local.py: real processes, with jax over gloo and with programs small enough to fail on purpose."""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vlmjax.sharding.mesh import make_mesh

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LAUNCHER = ROOT / "launch" / "local.py"


def start(*options, module_folder=HERE):
    """The launcher in a process of its own, without the test's own devices."""
    paths = os.pathsep.join([str(module_folder), str(ROOT)])
    env = {name: value for name, value in os.environ.items() if not name.startswith("VLMJAX_")}
    return subprocess.Popen(
        [sys.executable, str(LAUNCHER), *map(str, options)],
        env=env | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launch(*options, module_folder=HERE, timeout=120):
    """(exit code, output) of a run."""
    process = start(*options, module_folder=module_folder)
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


@pytest.fixture
def program(tmp_path):
    """Writes `program.py` and returns a function that launches it."""

    def make(source):
        (tmp_path / "program.py").write_text(
            f"import os, sys, time\nme = int(os.environ['VLMJAX_PROCESS_ID'])\n{source}"
        )
        return lambda *options: ("--module=program", "--grace_seconds=2", *options, "--", str(tmp_path))

    def run(source, *options):
        return launch(*make(source)(*options), module_folder=tmp_path)

    run.start = lambda source, *options: start(*make(source)(*options), module_folder=tmp_path)
    return run


@pytest.mark.slow
def test_two_processes_over_gloo_equal_one_process(tmp_path, monkeypatch):
    out = tmp_path / "found.npz"
    code, output = launch("--processes=2", "--devices_per_process=4", "--module=info_nce_program", "--", out)
    assert code == 0, output
    assert "[p0] processes 2 devices 8 rows range(0, 16)" in output
    assert "[p1] processes 2 devices 8 rows range(16, 32)" in output
    monkeypatch.syspath_prepend(HERE)
    reference = importlib.import_module("info_nce_program").compute(make_mesh(fsdp=2))
    with np.load(out) as found:
        assert set(found) == set(reference)
        for name, value in reference.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-8, err_msg=name)


def test_a_process_that_never_comes_is_named(program):
    code, output = program(
        """
os.environ["VLMJAX_INIT_TIMEOUT"] = "2"
if me == 1:
    time.sleep(60)
from vlmjax.errors import UserError
from vlmjax.sharding import distributed
try:
    distributed.initialize()
except UserError as error:
    sys.exit(f"{error}")
""",
        "--processes=3",
        "--devices_per_process=1",
    )
    assert code == 1
    assert re.search(r"expected 3 processes at 127.0.0.1:\d+, saw 2 within 2 s; missing: 1", output)


def test_output_and_pids_are_told_apart(program):
    code, output = program("print(f'hello from {me} of', os.environ['VLMJAX_NUM_PROCESSES'], os.getpid())")
    assert code == 0
    pids = dict(re.findall(r"\[(p\d)\] pid (\d+)", output))
    for i in range(2):
        assert f"[p{i}] hello from {i} of 2 {pids[f'p{i}']}" in output


def test_the_first_failure_ends_the_others_and_is_the_exit_code(program):
    began = time.monotonic()
    code, output = program("sys.exit(3) if me == 1 else time.sleep(60)", "--grace_seconds=30")
    assert code == 3
    assert "[p1] ended with exit code 3" in output
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("final", [77, 78])
def test_what_restarting_cannot_help_outweighs_a_lost_peer(program, final):
    """Process 1 sees its peer go and ends first; what the peer says next is still the verdict."""
    code, output = program(
        f"""
import signal
signal.signal(signal.SIGTERM, lambda *_: sys.exit({final}))
if me == 0:
    open(sys.argv[1] + "/ready", "w").close()
    time.sleep(60)
while not os.path.exists(sys.argv[1] + "/ready"):
    time.sleep(0.05)
sys.exit(75)
""",
        "--max_restarts=2",
        "--grace_seconds=20",
    )
    assert code == final
    assert "[p1] ended with exit code 75" in output and "starting again" not in output


def test_a_killed_process_is_started_again_with_its_peers(program):
    """The peer that would have waited for ever is ended, and both of the second try get to their end."""
    began = time.monotonic()
    code, output = program(
        """
first = not os.path.exists(sys.argv[1] + f"/seen-{me}")
open(sys.argv[1] + f"/seen-{me}", "w").close()
while len([name for name in os.listdir(sys.argv[1]) if name.startswith("seen")]) < 2:
    time.sleep(0.05)
if first and me == 1:
    os.kill(os.getpid(), 9)
if first:
    time.sleep(60)
""",
        "--max_restarts=1",
        "--grace_seconds=20",
    )
    assert code == 0 and time.monotonic() - began < 30
    assert "exit code 137: starting again (1 of at most 1)" in output


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace(program):
    code, output = program(
        """
import signal
if me == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(sys.argv[1] + "/ready", "w").close()
    time.sleep(60)
while not os.path.exists(sys.argv[1] + "/ready"):
    time.sleep(0.05)
sys.exit(5)
"""
    )
    assert code == 5
    assert "[p0] ended with exit code 137" in output


@pytest.mark.parametrize(
    ("code", "runs"), [(42, 3), (75, 3), (76, 3), (134, 3), (1, 3), (77, 1), (78, 1), (130, 1), (0, 1)]
)
def test_restarts(program, tmp_path, code, runs):
    """Each run leaves a mark; `--max_restarts=2` allows three."""
    found, output = program(
        f"open(sys.argv[1] + f'/mark-{{me}}-{{time.time_ns()}}', 'w').close()\nsys.exit({code})",
        "--max_restarts=2",
        "--processes=1",
    )
    assert found == code
    assert len(list(tmp_path.glob("mark-0-*"))) == runs
    assert output.count("starting again") == runs - 1


def test_a_restart_that_succeeds_ends_in_zero(program):
    code, _ = program(
        """
first = not os.path.exists(sys.argv[1] + f"/seen-{me}")
open(sys.argv[1] + f"/seen-{me}", "w").close()
sys.exit(42 if first else 0)
""",
        "--max_restarts=1",
    )
    assert code == 0


def test_sigterm_goes_to_every_process_and_nothing_is_restarted(program):
    launcher = program.start(
        """
import signal
def leave(*_):
    print("leaving in good order", flush=True)
    sys.exit(42)
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
time.sleep(60)
""",
        "--max_restarts=5",
    )
    lines = []
    while sum("ready" in line for line in lines) < 2:
        lines.append(launcher.stdout.readline())
        assert lines[-1], lines
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 42
    assert "[p0] leaving in good order" in output and "[p1] leaving in good order" in output
    assert "starting again" not in output


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children that their parent died")
def test_killing_the_launcher_leaves_nothing_behind(program):
    launcher = program.start("print('ready', flush=True)\ntime.sleep(60)")
    lines = []
    while sum("ready" in line for line in lines) < 2:
        lines.append(launcher.stdout.readline())
        assert lines[-1], lines
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", "".join(lines))]
    launcher.kill()
    launcher.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_dry_run_prints_each_command_and_runs_nothing(tmp_path):
    code, output = launch(
        "--processes=2",
        "--devices_per_process=3",
        "--dry-run",
        "--",
        "--config=a.py:tiny",
        f"--workdir={tmp_path}/a b",
    )
    assert code == 0
    lines = output.splitlines()
    assert lines[2:] == [f"[p{i}] devices {3 * i}-{3 * i + 2} of 6, simulated on this CPU" for i in range(2)]
    for i, line in enumerate(lines[:2]):
        assert line.startswith(f"[p{i}] ") and f"VLMJAX_PROCESS_ID={i}" in line
        assert "--xla_force_host_platform_device_count=3" in line and "device_count=8" not in line
        assert line.endswith(f"-m vlmjax.main --config=a.py:tiny '--workdir={tmp_path}/a b'")


def test_options_after_the_dashes_are_not_ours():
    code, output = launch("--processes=0", "--dry-run")
    assert code == 2 and "expected at least 1" in output
    code, output = launch("--config=a.py", "--dry-run")
    assert code == 2 and "--config" in output
