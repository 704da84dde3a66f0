"""Multi-host set-up: how the processes of one run find each other."""

import importlib.util
import logging
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

from vlmjax.errors import UserError
from vlmjax.sharding.peers import exit_when_the_runtime_aborts
from vlmjax.sharding.roll_call import is_loopback, roll_call

# Set by launch/local.py, one value per process; any other launcher may set them as well.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = "VLMJAX_COORDINATOR", "VLMJAX_NUM_PROCESSES", "VLMJAX_PROCESS_ID"
TIMEOUT, HEARTBEAT = "VLMJAX_INIT_TIMEOUT", "VLMJAX_HEARTBEAT"

# A dead host is noticed within half a minute; jax's 100 s are 100 s of a pod waiting.
_HEARTBEAT_SECONDS = 30
_INIT_SECONDS = 300
# Ports for the meeting of a SLURM step: above those that Linux gives to clients.
_FIRST_PORT, _PORTS = 61_440, 4_096

logger = logging.getLogger(__name__)


def initialize() -> None:
    """Join the other processes of this run, before anything else touches jax. A second call does nothing.

    In order: the variables VLMJAX_COORDINATOR (`host:port` of process 0), VLMJAX_NUM_PROCESSES and
    VLMJAX_PROCESS_ID, also for a single process; a SLURM step of several tasks; a cluster that jax recognises
    (Open MPI, TPU pods); otherwise one process alone. VLMJAX_INIT_TIMEOUT sets how many seconds processes wait for
    each other (300), VLMJAX_HEARTBEAT after how many seconds of silence one is given up (30); the others then exit with
    75. A process that joined says on stderr which it is and which devices are its own.

    Raises:
      UserError: the variables are incomplete or make no sense, or not all processes came in time.
    """
    if jax.distributed.is_initialized():
        return
    cluster = detected_cluster(os.environ)
    settings = explicit_settings(os.environ) or (slurm_settings(os.environ) if cluster == "SLURM" else None)
    seconds = _number(os.environ, TIMEOUT, default=_INIT_SECONDS)
    heartbeat = _number(os.environ, HEARTBEAT, default=_HEARTBEAT_SECONDS)
    options = {"heartbeat_timeout_seconds": heartbeat, "initialization_timeout": seconds}
    if settings:
        coordinator, processes, process = settings
        roll_call(coordinator, processes, process, seconds)
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            slurm_devices(os.environ, processes, process),
            cluster_detection_method="deactivate",
            # By default jax listens on every interface, also for processes that are all on this machine.
            coordinator_bind_address=coordinator if is_loopback(coordinator.rpartition(":")[0]) else None,
            **options,
        )
    elif cluster:
        logger.info("joining the other processes of this %s job", cluster)
        jax.distributed.initialize(**options)
    else:
        return
    exit_when_the_runtime_aborts()
    print(device_line(), file=sys.stderr, flush=True)


def device_line() -> str:
    """Which process this is, where it runs, and which of the run's devices are its own."""
    mine = ", ".join(str(device.id) for device in jax.local_devices())
    return (
        f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}, pid {os.getpid()}: "
        f"{jax.default_backend()} device(s) {mine} of {jax.device_count()} in all"
    )


def explicit_settings(env: Mapping[str, str]) -> tuple[str, int, int] | None:
    """(coordinator, processes, process) from the three variables; None when none of them is set.

    Raises UserError when some are missing or their values cannot be.
    """
    names = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
    absent = [name for name in names if not env.get(name)]
    if len(absent) == len(names):
        return None
    if absent:
        raise UserError(f"{', '.join(absent)} not set: {', '.join(names)} are set together or not at all")
    coordinator, processes, process = env[COORDINATOR], _number(env, NUM_PROCESSES), _number(env, PROCESS_ID)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{COORDINATOR} = {coordinator!r}: expected host:port of process 0")
    if not 0 <= process < processes:
        raise UserError(
            f"{PROCESS_ID} = {process} with {NUM_PROCESSES} = {processes}: expected 0 <= id < number"
        )
    return coordinator, processes, process


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name) or str(default)
    if not text.isdigit():
        raise UserError(f"{name} = {text!r}: expected a whole number")
    return int(text)


def detected_cluster(env: Mapping[str, str]) -> str | None:
    """Name of the environment that promises jax several processes, or None.

    A SLURM shell or a single-host machine is no such promise: joining there would only wait for nobody.
    """
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in env and "SLURM_LOCALID" in env:
        return "SLURM"
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "MEGASCALE_COORDINATOR_ADDRESS" in env or "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU pod"
    # On a Cloud TPU VM only its metadata server knows of the other hosts, and jax asks it.
    on_tpu_vm = any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))
    if on_tpu_vm and importlib.util.find_spec("libtpu") and "TPU_SKIP_MDS_QUERY" not in env:
        return None if env.get("TPU_WORKER_HOSTNAMES") else "Cloud TPU VM"
    return None


def slurm_settings(env: Mapping[str, str]) -> tuple[str, int, int]:
    """(coordinator, tasks, task) of a SLURM step: process 0 is on its first node, at a port made from the job's id."""
    port = _FIRST_PORT + _number(env, "SLURM_JOB_ID", default=0) % _PORTS
    host = first_host(env["SLURM_STEP_NODELIST"])
    return f"{host}:{port}", _number(env, "SLURM_NTASKS"), _number(env, "SLURM_PROCID")


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `rack1-node03` of `rack[1-2]-node[03,07-09],login`."""
    whole = re.match(r"(?:[^,\[]|\[[^]]*\])+", nodes)
    if not whole:
        raise UserError(f"SLURM_STEP_NODELIST = {nodes!r}: expected names of nodes")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", whole[0])


def slurm_devices(env: Mapping[str, str], processes: int, process: int) -> list[int] | None:
    """The share of its node's GPUs that is a SLURM task's own, of those it sees; None for all of them.

    Tasks of one node divide its GPUs evenly unless SLURM has already shown each its own (`--gpus-per-task`).

    Raises UserError when they cannot be divided.
    """
    if (env.get("SLURM_NTASKS"), env.get("SLURM_PROCID")) != (str(processes), str(process)):
        return None  # Another launcher, inside a SLURM job: what a process sees is its business.
    here = max(1, processes // _number(env, "SLURM_STEP_NUM_NODES", default=1))
    task, gpus = _number(env, "SLURM_LOCALID", default=0), env.get("SLURM_GPUS_ON_NODE", "")
    if not gpus.isdigit():  # A cluster that does not count them, or has none.
        return [task] if here > 1 else None
    visible = env.get("CUDA_VISIBLE_DEVICES")
    seen = int(gpus) if visible is None else len([name for name in visible.split(",") if name])
    if seen < int(gpus):
        return list(range(seen))
    if seen % here:
        raise UserError(
            f"{seen} GPUs for {here} tasks on a node: expected one task per GPU, or an even share"
        )
    share = seen // here
    return list(range(task * share, (task + 1) * share))
