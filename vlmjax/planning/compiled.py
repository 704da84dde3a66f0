"""Compilation ahead of time: what a program needs of each device's memory, or by how much it is too large."""

import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from vlmjax.errors import PlanError
from vlmjax.planning.chips import GIB, Chip
from vlmjax.planning.subject import Subject

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40, "P": 2**50, "E": 2**60}
_SIZE = r"\(?([\d.]+)([KMGTPE]?)\)?"
# libtpu's two ways to say it: of what it knows before and after it has laid out the program.
_TOO_LARGE = (
    re.compile(rf"total memory required for [\w ]*{_SIZE} exceeds available HBM {_SIZE}"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)


class Compiled(NamedTuple):
    """Bytes per device. Of a program that does not fit only `needed_bytes` and the time are known."""

    seconds: float
    fits: bool | None  # None: nobody knows the memory of a simulated device
    hbm_bytes: int | None
    needed_bytes: int  # the peak, or what the compiler asked for in vain
    argument_bytes: int | None = None
    output_bytes: int | None = None
    temp_bytes: int | None = None
    peak_bytes: int | None = None
    text: str = ""  # the scheduled program

    @property
    def missing_bytes(self) -> int:
        """How much more memory the program would need."""
        return max(self.needed_bytes - (self.hbm_bytes or 0), 0)


def compile_subject(subject: Subject, chip: Chip | None) -> Compiled:
    """Lower and compile; a program too large for a TPU is an answer, any other failure of the compiler is raised."""
    start = time.perf_counter()
    try:
        program, text = _compile(subject.step.lower(*subject.arguments), chip)
    except jax.errors.JaxRuntimeError as error:
        sizes = too_large(str(error))
        if sizes is None and "RESOURCE_EXHAUSTED" in str(error):
            raise PlanError(
                f"{subject.title}: XLA cannot compile it: {str(error).splitlines()[0]}"
            ) from error
        if sizes is None:
            raise
        return Compiled(time.perf_counter() - start, False, sizes[1], sizes[0])
    seconds, stats = time.perf_counter() - start, program.memory_analysis()
    peak, memory = _peak(stats), chip and chip.memory
    return Compiled(
        seconds=seconds,
        fits=peak <= memory if memory else None,
        hbm_bytes=memory,
        needed_bytes=peak,
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        temp_bytes=stats.temp_size_in_bytes,
        peak_bytes=peak,
        text=text,
    )


def _compile(lowered: Any, chip: Chip | None) -> tuple[Any, str]:
    """A compiled program and the text of its schedule.

    Without a GPU to time them on, XLA takes Triton for every matrix product, and fails on most of our shapes; cuBLAS
    takes them all, and most of them on a device too. A TPU's program is dumped as well: libtpu 0.0.52 makes some
    programs with asynchronous operations that it then cannot hand out as text (its check of async-update).
    """
    if chip is None:
        program = lowered.compile()
        return program, program.as_text()
    if not chip.clock:
        program = lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})
        return program, program.as_text()
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        program = lowered.compile(compiler_options=options)
        try:
            return program, program.as_text()
        except jax.errors.JaxRuntimeError:
            return program, dumped(Path(folder))


def dumped(folder: Path) -> str:
    """The scheduled program that libtpu dumped, the largest of several; empty where it left none."""
    found = sorted(folder.glob("*.after_codegen.txt"), key=lambda path: path.stat().st_size)
    return found[-1].read_text() if found else ""


def _peak(stats: Any) -> int:
    """The largest sum of what is alive at once; the sum of all parts where the backend's own figure cannot be."""
    peak, temporary = getattr(stats, "peak_memory_in_bytes", 0), stats.temp_size_in_bytes
    parts = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes + temporary
    return peak if peak >= max(temporary, stats.argument_size_in_bytes, 1) else parts


def too_large(message: str) -> tuple[int, int] | None:
    """(bytes needed, bytes there) from the compiler's message, or None where it says something else."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in _TOO_LARGE:
        if found := pattern.search(message):
            needed, there = ((float(found[i]), found[i + 1]) for i in (1, 3))
            return tuple(int(size * _UNITS[unit]) for size, unit in (needed, there))
    return None
