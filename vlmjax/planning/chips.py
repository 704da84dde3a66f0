"""What each kind of device can do, with sources: the numbers a prediction divides by."""

import os
from typing import NamedTuple

from vlmjax.planning.names import Name
from vlmjax.training.metrics import PEAK_FLOPS

GIB = 2**30


class Chip(NamedTuple):
    """One device as jax counts them. Units: bytes, bytes per second, cycles per second."""

    name: str  # as jax names it, a key of PEAK_FLOPS
    memory: int  # what a program may use of it
    bandwidth: float  # of its memory
    clock: float | None  # of the cycles in XLA's schedule; None where it schedules without cycles
    ports: int  # fast links: ICI ports, or 1 for NVLink as a whole
    link: float  # of one of them in one direction
    network: float  # between slices or hosts, per device

    @property
    def peak(self) -> float:
        """Peak bfloat16 FLOP/s."""
        return PEAK_FLOPS[self.name]


# Google's pages of each TPU (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e) give HBM bandwidth, ICI per chip in
# both directions, ports, and the data-centre network per pod or chip; v4: Jouppi et al. 2023, arXiv 2304.01433.
# ICI: 90 % of that, which is what the JAX scaling book (jax-ml.github.io/scaling-book/tpus) counts with.
# Memory: what XLA itself has left for a program; libtpu 0.0.52 refuses to compile what needs more.
# Clock: PEAK_FLOPS over the FLOPs of a cycle in XLA's schedules (docs/plan.md tells how that was found).
_TPUS = {
    "v4": Chip("TPU v4", int(30.75 * GIB), 1.2e12, 275e12 / 262_144, 6, 0.9 * 50e9, 6.25e9),
    "v5e": Chip("TPU v5 lite", int(15.75 * GIB), 0.819e12, 197e12 / 131_072, 4, 0.9 * 50e9, 3.125e9),
    "v5p": Chip("TPU v5p", int(95.73 * GIB), 2.765e12, 459e12 / 262_144, 6, 0.9 * 100e9, 6.25e9),
    "v6e": Chip("TPU v6 lite", int(31.24 * GIB), 1.638e12, 918e12 / 524_288, 4, 0.9 * 100e9, 12.5e9),
}
# NVIDIA's data sheets: 80 GB at 3.35 TB/s and 141 GB at 4.8 TB/s; NVLink 900 GB/s in both directions together.
# Between hosts: one 400 Gb/s adapter per GPU, as in NVIDIA's DGX H100 and H200.
_GPUS = {
    "h100": Chip("NVIDIA H100", 84_942_979_072, 3.352e12, None, 1, 450e9, 50e9),
    "h200": Chip("NVIDIA H200", 141_000_000_000, 4.8e12, None, 1, 450e9, 50e9),
}
# The share of a GPU's memory that jax takes for itself; this is its own variable and its own default.
GPU_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def chip_of(name: Name) -> Chip | None:
    """The device behind a name; None for a simulated one, whose speed and memory are this machine's."""
    if name.kind in _TPUS:
        return _TPUS[name.kind]
    if name.kind not in _GPUS:
        return None
    gpu = _GPUS[name.kind]
    return gpu._replace(memory=int(gpu.memory * gpu_share()))


def gpu_share() -> float:
    """The share of a GPU's memory that the training process will be given."""
    try:
        return min(float(os.environ.get(GPU_SHARE, "")), 1.0)
    except ValueError:
        return 0.75
