"""Devices that are not here: descriptions that XLA compiles for, from libtpu and the CUDA plugin."""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from vlmjax.errors import PlanError
from vlmjax.planning.names import Name

LIBTPU = "libtpu is not installed, and TPU programs are compiled by it: pip install -e '.[plan]' (Linux)"
CUDA = "jax's CUDA plugin is not installed, and GPU programs are compiled by it: pip install -e '.[cuda]' (Linux)"
_SPECS = Path(__file__).parent / "gpus"


def check_installed(name: Name) -> None:
    """Raise PlanError where the compiler of a device set is missing, with the command that installs it."""
    if name.platform == "tpu" and not importlib.util.find_spec("libtpu"):
        raise PlanError(f"--topology={name.text}: {LIBTPU}")
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if name.platform == "cuda" and not any(importlib.util.find_spec(plugin) for plugin in plugins):
        raise PlanError(f"--topology={name.text}: {CUDA}")


def open_devices(name: Name) -> Sequence[Any]:
    """The devices of a set, enough of them to compile for, in jax's order.

    Raises:
      PlanError: the compiler is missing, or knows no such set.
    """
    check_installed(name)
    if name.platform == "cpu":
        return _local(name)
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    try:
        return list((_tpu if name.platform == "tpu" else _cuda)(name).devices)
    except (RuntimeError, ValueError) as error:
        raise PlanError(
            f"--topology={name.text}: the compiler does not take it ({_first_line(error)})"
        ) from error


def _local(name: Name) -> Sequence[Any]:
    found = jax.devices("cpu")
    if len(found) < name.devices:
        raise PlanError(f"--devices={name.devices}: jax was started before with {len(found)}")
    return found[: name.devices]


def _tpu(name: Name) -> Any:
    options: dict[str, Any] = {}
    if name.kind in ("v5e", "v6e"):
        # Only a side of 16 is closed to a ring; the compiler must know, or it finds no way for some transfers.
        options["wrap"] = (*(size == 16 for size in name.shape), False)
    if name.kind == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip are one device, as on a real v4
    if name.slices > 1:
        options["num_slices"] = name.slices
    shape = "x".join(map(str, name.shape))
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{name.kind}:{shape}", **options)


def _cuda(name: Name) -> Any:
    target = (_SPECS / f"{name.kind}.txtpb").read_text()
    hosts, gpus = name.shape
    shape = f"{name.slices}x{hosts}x{gpus}"
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[0].split())[:300]
