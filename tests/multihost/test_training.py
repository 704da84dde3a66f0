"""The same recipe gives the same losses on one device, on meshes of eight, and over two processes."""

import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from training import tiny

pytestmark = pytest.mark.slow

LAUNCHER = tiny.ROOT / "launch" / "local.py"
STEPS = 20


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny.write_recipe(
        tmp_path_factory.mktemp("recipe"),
        batch_size=32,
        total__steps=STEPS,
        checkpoint__every__steps=8,
        ema__decay=0.9,
        data__threads=1,
    )


def alone(recipe, workdir, *arguments, devices=1):
    arguments = (f"--config={recipe}", f"--workdir={workdir}", *arguments)
    run = tiny.python("-m", "vlmjax.main", *arguments, devices=devices)
    assert run.returncode == 0, run.stdout + run.stderr
    return workdir


def together(recipe, workdir, *arguments):
    """Two processes of four devices each, over gloo."""
    command = [sys.executable, LAUNCHER, "--processes=2", "--devices_per_process=4", "--"]
    command += [f"--config={recipe}", f"--workdir={workdir}", *arguments]
    run = subprocess.run(
        list(map(str, command)),
        cwd=tiny.ROOT,
        env=tiny.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout
    assert "8 cpu device(s) in 2 process(es)" in run.stdout
    return workdir


@pytest.fixture(scope="module")
def one_device(recipe, tmp_path_factory):
    losses = tiny.losses(alone(recipe, tmp_path_factory.mktemp("one") / "run"))
    assert len(losses) == STEPS and losses[-1] < losses[0]
    return losses


@pytest.fixture(scope="module")
def two_processes(recipe, tmp_path_factory):
    return together(
        recipe, tmp_path_factory.mktemp("two") / "run", "--config.mesh.fsdp=2", "--config.export=True"
    )


@pytest.mark.parametrize(
    "mesh",
    [("--config.mesh.data=8",), ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")],
)
def test_eight_devices_equal_one(recipe, one_device, tmp_path, mesh):
    losses = tiny.losses(alone(recipe, tmp_path / "run", *mesh, devices=8))
    np.testing.assert_allclose(losses, one_device, rtol=1e-5)


def test_two_processes_equal_one_device(two_processes, one_device):
    np.testing.assert_allclose(tiny.losses(two_processes), one_device, rtol=1e-5)
    steps = [row["step"] for row in tiny.rows(two_processes) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))  # one process writes the log
    assert (two_processes / "report.html").is_file() and (
        two_processes / "hf" / "model.safetensors"
    ).is_file()


def test_two_processes_write_what_one_continues(recipe, two_processes, one_device, tmp_path):
    """The checkpoint of step 16, written by two processes onto eight devices, goes on on one device."""
    shutil.copytree(two_processes, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["16"]
    alone(recipe, tmp_path / "run")
    rows = [row for row in tiny.rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([row["loss"] for row in rows], one_device, rtol=1e-5)


def test_a_killed_process_is_restarted_from_the_newest_checkpoint(recipe, one_device, tmp_path):
    """Process 1 is killed after step 9; the launcher ends process 0, starts both, and they go on from step 8."""
    command = [sys.executable, LAUNCHER, "--processes=2", "--devices_per_process=2", "--max_restarts=1", "--"]
    command += [f"--config={recipe}", f"--workdir={tmp_path}/run"]
    output, pid = "", None
    with subprocess.Popen(
        list(map(str, command)),
        cwd=tiny.ROOT,
        env=tiny.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launcher:
        for line in launcher.stdout:
            output += line
            if found := re.match(r"\[p1\] pid (\d+)", line):
                pid = int(found[1])
            if "step 9/" in line and "starting again" not in output:
                os.kill(pid, signal.SIGKILL)
    assert launcher.returncode == 0, output
    assert output.count("starting again (1 of at most 1)") == 1
    rows = [row for row in tiny.rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([row["loss"] for row in rows], one_device, rtol=1e-5)
