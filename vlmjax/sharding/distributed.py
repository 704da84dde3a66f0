"""Multi-host set-up: how the processes of one run find each other."""

import importlib.util
import logging
import os
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

logger = logging.getLogger(__name__)


def initialize() -> None:
    """Join the other processes of this run, before anything else touches jax. A second call does nothing.

    In order: the variables VLMJAX_COORDINATOR (`host:port` of process 0), VLMJAX_NUM_PROCESSES and
    VLMJAX_PROCESS_ID; a cluster that jax recognises (SLURM, Open MPI, TPU pods); otherwise one process alone.
    VLMJAX_INIT_TIMEOUT sets how many seconds processes wait for each other (300), VLMJAX_HEARTBEAT after how many
    seconds of silence one is given up (30); the others then exit with 75.

    Raises:
      UserError: the variables are incomplete or make no sense, or not all processes came in time.
    """
    if jax.distributed.is_initialized():
        return
    options = {"heartbeat_timeout_seconds": _number(os.environ, HEARTBEAT, default=_HEARTBEAT_SECONDS)}
    given = explicit_settings(os.environ)
    if given is not None:
        coordinator, processes, process = given
        if processes == 1:
            return
        seconds = _number(os.environ, TIMEOUT, default=_INIT_SECONDS)
        roll_call(coordinator, processes, process, seconds)
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=seconds,
            cluster_detection_method="deactivate",
            # By default jax listens on every interface, also for processes that are all on this machine.
            coordinator_bind_address=coordinator if is_loopback(coordinator.rpartition(":")[0]) else None,
            **options,
        )
    elif cluster := detected_cluster(os.environ):
        logger.info("joining the other processes of this %s job", cluster)
        jax.distributed.initialize(
            local_device_ids=slurm_devices(os.environ) if cluster == "SLURM" else None, **options
        )
    else:
        return
    exit_when_the_runtime_aborts()
    logger.info("process %d of %d", jax.process_index(), jax.process_count())


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


def slurm_devices(env: Mapping[str, str]) -> list[int] | None:
    """GPUs of a task that has its node to itself, for which jax would take one; None leaves it to jax."""
    nodes, tasks = int(env.get("SLURM_STEP_NUM_NODES", 0)), int(env.get("SLURM_NTASKS", 0))
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if nodes == tasks and gpus.isdigit() else None
