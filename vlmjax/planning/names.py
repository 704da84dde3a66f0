"""Names of device sets, such as v5e:16x16, read and checked before anything heavy is imported."""

import math
import os
import re
from typing import NamedTuple

from vlmjax.config_checks import nearest
from vlmjax.errors import PlanError

TPUS = ("v4", "v5e", "v5p", "v6e")
GPUS = ("h100", "h200")
# Chips of one slice at most, and what larger runs are made of. libtpu ends the whole process for a larger v5e.
_LARGEST = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256}
_MOST_DEVICES = 65_536


class Name(NamedTuple):
    """A parsed name: `slices` times `kind` in the `shape` of one slice (chips of a TPU; hosts and GPUs)."""

    text: str
    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def platform(self) -> str:
        """`tpu`, `cuda` or `cpu`."""
        return "tpu" if self.kind in TPUS else "cuda" if self.kind in GPUS else "cpu"

    @property
    def devices(self) -> int:
        """How many devices, as jax counts them: a chip of a TPU is one."""
        return self.slices * math.prod(self.shape)


def parse_names(text: str) -> list[Name]:
    """The device sets of a comma-separated list.

    Raises PlanError for one that does not exist, with what does.
    """
    return [parse_name(part.strip()) for part in text.split(",") if part.strip()]


def parse_name(text: str) -> Name:
    """One device set: `v5e:16x16`, `4xv5e:16x16` for four slices, `h100:8x8` for eight hosts of eight GPUs."""
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", text)
    if not match:
        raise PlanError(
            f"--topology={text}: expected KIND:SHAPE such as v5e:16x16, v5p:8x8x8, 4xv5e:16x16 (four slices) or "
            "h100:8x8 (hosts x GPUs)"
        )
    kind, shape = match[2], tuple(map(int, match[3].split("x")))
    if kind not in (*TPUS, *GPUS):
        raise PlanError(f"--topology={text}: unknown device {kind!r}{nearest(kind, (*TPUS, *GPUS))}")
    name = Name(text, kind, shape, int(match[1] or 1))
    if not 1 <= name.slices <= 1024 or 0 in shape:
        raise PlanError(f"--topology={text}: sizes are at least 1, and slices at most 1024")
    (_check_gpus if kind in GPUS else _check_slice)(name)
    if name.devices > _MOST_DEVICES:
        raise PlanError(f"--topology={text}: {name.devices} devices; at most {_MOST_DEVICES}")
    return name


def _check_gpus(name: Name) -> None:
    if len(name.shape) != 2 or not 1 <= name.shape[1] <= 8 or name.slices != 1:
        raise PlanError(
            f"--topology={name.text}: expected hosts x GPUs per host, at most 8, e.g. {name.kind}:8x8"
        )


def _check_slice(name: Name) -> None:
    """Refuse what libtpu would refuse, or not survive."""
    flat, shape = name.kind in ("v5e", "v6e"), name.shape
    example = "16x16, 8x8 or 2x4" if flat else "8x8x8, 4x4x4 or 2x2x1"
    largest = _LARGEST[name.kind]
    if math.prod(shape) > largest or (flat and max(shape) > 16):
        more = f"2x{name.kind}:16x16" if flat else f"2x{name.kind}:16x16x16"
        raise PlanError(
            f"--topology={name.text}: a slice has at most {largest} chips"
            f"{' (16x16)' if flat else ''}; several slices are written {more}"
        )
    if flat:
        fits = len(shape) == 2 and all(size & (size - 1) == 0 for size in shape)
    else:  # wired as cubes of 4 x 4 x 4, or as a part of one
        part = all(size in (1, 2, 4) for size in shape) and shape[:2] not in ((1, 2), (2, 1), (1, 4), (4, 1))
        fits = len(shape) == 3 and (part or all(size % 4 == 0 for size in shape))
    if not fits:
        raise PlanError(f"--topology={name.text}: {name.kind} slices are shaped like {example}")


def local_name(devices: int) -> Name:
    """So many simulated devices of this machine's CPU."""
    if not 1 <= devices <= 1024:
        raise PlanError(f"--devices={devices}: expected 1 to 1024 simulated devices")
    return Name(f"cpu:{devices}", "cpu", (devices,))


def prepare_environment(names: list[Name]) -> None:
    """Set what jax and libtpu read when they are imported: planning never touches a device of this machine."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no metadata server: this is no TPU VM, and it would wait for one
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # two plans at once would fail at libtpu's lock file
    # libtpu asks what machine this is, and tells at length that it does not know; any answer will do.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # jax's plugin asks libraries that ask for a driver
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    simulated = max((name.devices for name in names if name.platform == "cpu"), default=0)
    if simulated:
        given = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
        os.environ["XLA_FLAGS"] = f"{given} --xla_force_host_platform_device_count={simulated}".strip()
