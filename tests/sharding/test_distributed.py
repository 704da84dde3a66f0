"""Which processes a run expects, and who is told what when some do not come."""

import socket
import threading
import time

import jax
import pytest

from vlmjax.errors import UserError
from vlmjax.sharding import distributed
from vlmjax.sharding.distributed import detected_cluster, explicit_settings, slurm_devices
from vlmjax.sharding.roll_call import roll_call

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


def test_a_slurm_task_alone_on_its_node_takes_all_its_gpus():
    env = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    assert slurm_devices(env) == [0, 1, 2, 3]
    assert slurm_devices(env | {"SLURM_NTASKS": "8"}) is None
    assert slurm_devices({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}) is None


@pytest.mark.parametrize("env", [{}, THREE | {"VLMJAX_NUM_PROCESSES": "1", "VLMJAX_PROCESS_ID": "0"}])
def test_one_process_needs_no_set_up(monkeypatch, env):
    monkeypatch.setattr(distributed.os, "environ", env)
    distributed.initialize()
    assert not jax.distributed.is_initialized()


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
