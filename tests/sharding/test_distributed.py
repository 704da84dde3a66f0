"""Which processes a run expects, and who is told what when some do not come."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from vlmjax.errors import UserError
from vlmjax.sharding import distributed
from vlmjax.sharding.distributed import (
    detected_cluster,
    explicit_settings,
    first_host,
    slurm_devices,
    slurm_settings,
)
from vlmjax.sharding.roll_call import roll_call

ROOT = Path(__file__).resolve().parents[2]

THREE = {"VLMJAX_COORDINATOR": "10.0.0.1:1234", "VLMJAX_NUM_PROCESSES": "4", "VLMJAX_PROCESS_ID": "3"}


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def call_all(present, processes, timeout, before=None):
    """Roll call of some of the processes, in threads; their errors (or None) by number."""
    address, outcome = free_address(), {}

    def one(process):
        try:
            outcome[process] = roll_call(address, processes, process, timeout)
        except UserError as error:
            outcome[process] = str(error)

    threads = [threading.Thread(target=one, args=(p,)) for p in present]
    for thread in threads:
        thread.start()
    if before:
        before(address)
    for thread in threads:
        thread.join(timeout=30)
    return outcome


def test_variables_are_read_together():
    assert explicit_settings({}) is None
    assert explicit_settings(THREE) == ("10.0.0.1:1234", 4, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"VLMJAX_PROCESS_ID": ""}, "VLMJAX_PROCESS_ID not set: .* together or not at all"),
        ({"VLMJAX_PROCESS_ID": "4"}, "VLMJAX_PROCESS_ID = 4 with VLMJAX_NUM_PROCESSES = 4"),
        ({"VLMJAX_PROCESS_ID": "one"}, "VLMJAX_PROCESS_ID = 'one': expected a whole number"),
        ({"VLMJAX_COORDINATOR": "10.0.0.1"}, "VLMJAX_COORDINATOR = '10.0.0.1': expected host:port"),
    ],
)
def test_variables_that_make_no_sense_are_named(change, message):
    with pytest.raises(UserError, match=message):
        explicit_settings(THREE | change)


def test_only_a_promise_of_several_processes_is_a_cluster():
    step = {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_LOCALID": "0"}
    assert detected_cluster(step) == "SLURM"
    assert detected_cluster(step | {"SLURM_NTASKS": "1"}) is None
    assert detected_cluster({"SLURM_NTASKS": "2"}) is None  # sbatch's own shell, outside srun
    assert detected_cluster({"OMPI_COMM_WORLD_SIZE": "8"}) == "Open MPI"
    assert detected_cluster({"TPU_WORKER_HOSTNAMES": "a,b"}) == "TPU pod"
    assert detected_cluster({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert detected_cluster({"MEGASCALE_COORDINATOR_ADDRESS": "a"}) == "TPU pod"
    assert detected_cluster({}) is None


SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
}


def test_a_slurm_step_meets_on_its_first_node():
    assert slurm_settings(SLURM) == (f"gpu07:{61440 + 4}", 8, 6)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("vm", "vm"),
        ("n1,n2", "n1"),
        ("n[001-015],m", "n001"),
        ("n[3,5-7]", "n3"),
        ("rack[1-2]-node[03,07-09],login", "rack1-node03"),
        ("node-a[1-2].domain", "node-a1.domain"),
    ],
)
def test_first_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("change", "devices"),
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, [2]),  # one task per GPU
        ({"SLURM_GPUS_ON_NODE": "8"}, [4, 5]),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, [4, 5]),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "4,5"}, [0, 1]),  # bound by SLURM
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "2"}, [0]),
        ({}, [2]),  # a cluster that does not count its GPUs: as jax does
        ({"SLURM_STEP_NUM_NODES": "8", "SLURM_LOCALID": "0"}, None),
        ({"SLURM_STEP_NUM_NODES": "8", "SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "2"}, [0, 1]),
    ],
)
def test_slurm_tasks_divide_the_gpus_of_their_node(change, devices):
    assert slurm_devices(SLURM | change, 8, 6) == devices


def test_gpus_that_cannot_be_divided_are_named():
    with pytest.raises(UserError, match="6 GPUs for 4 tasks on a node: expected one task per GPU"):
        slurm_devices(SLURM | {"SLURM_GPUS_ON_NODE": "6"}, 8, 6)


def test_another_launcher_inside_a_slurm_job_keeps_its_devices():
    assert slurm_devices(SLURM | {"SLURM_GPUS_ON_NODE": "4"}, 2, 0) is None


def test_one_process_alone_needs_no_set_up(monkeypatch):
    monkeypatch.setattr(distributed.os, "environ", {})
    distributed.initialize()
    assert not jax.distributed.is_initialized()


def test_one_process_joins_where_a_launcher_says_so():
    """In a process of its own: jax is joined once and for good."""
    program = (
        "import jax; from vlmjax.sharding import distributed; distributed.initialize(); distributed.initialize(); "
        "print(jax.distributed.is_initialized(), jax.process_count())"
    )
    variables = {
        "VLMJAX_COORDINATOR": free_address(),
        "VLMJAX_NUM_PROCESSES": "1",
        "VLMJAX_PROCESS_ID": "0",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout == "True 1\n", run.stderr
    assert re.search(r"process 0 of 1 on \S+, pid \d+: cpu device\(s\) 0, 1 of 2 in all", run.stderr)


def test_all_present_is_silent():
    assert call_all(range(4), 4, timeout=20) == {0: None, 1: None, 2: None, 3: None}


def test_everybody_who_came_learns_who_did_not():
    outcome = call_all([0, 2], 4, timeout=1)
    for process in (0, 2):
        assert f"process {process}: expected 4 processes" in outcome[process]
        assert "saw 2 within 1 s; missing: 1, 3" in outcome[process]


def test_without_process_0_the_others_say_so(monkeypatch):
    monkeypatch.setattr("vlmjax.sharding.roll_call._PATIENCE_SECONDS", 0.5)
    assert "nobody answered at 127.0.0.1:" in call_all([1], 2, timeout=0.5)[1]


def test_strangers_at_the_port_are_not_counted():
    def knock(address):
        time.sleep(0.3)
        host, port = address.split(":")
        for line in (b"GET / HTTP/1.1\r\n", b"7\n", b""):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(line)

    assert "missing: 1" in call_all([0], 2, timeout=1.5, before=knock)[0]


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on port {port}"):
            roll_call(f"127.0.0.1:{port}", 2, 0, 1)
