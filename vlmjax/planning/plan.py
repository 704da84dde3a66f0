"""From a compiled program to what is told about it: memory, time, collectives, and what to change."""

from typing import Any, NamedTuple

from vlmjax.planning import hlo
from vlmjax.planning.chips import Chip, chip_of
from vlmjax.planning.compiled import Compiled, compile_subject
from vlmjax.planning.fabric import Fabric
from vlmjax.planning.names import Name
from vlmjax.planning.subject import Subject
from vlmjax.planning.timing import KERNEL_UTILISATION, cycles_timing, roofline_timing
from vlmjax.planning.walk import Walk, Walker

CYCLES = "cycles of XLA's schedule"
ROOFLINE = "roofline: every kernel at peak FLOP/s or at full memory bandwidth"


class Plan(NamedTuple):
    """One program on one set of devices."""

    name: Name
    chip: Chip | None
    subject: Subject
    compiled: Compiled
    walk: Walk | None  # None where there is no time to predict
    method: str  # how seconds were predicted, or why not
    utilisation: float

    @property
    def seconds(self) -> float | None:
        """Predicted seconds of one call."""
        known = self.walk and self.chip
        return self.walk.compute_seconds + self.walk.exposed_seconds if known else None

    @property
    def ideal_seconds(self) -> float | None:
        """Seconds of the model FLOPs alone, all devices at their peak."""
        return self.subject.flops / (self.name.devices * self.chip.peak) if self.chip else None

    @property
    def mfu(self) -> float | None:
        """Predicted model FLOPs utilisation."""
        return self.ideal_seconds / self.seconds if self.seconds else None

    def days(self) -> float | None:
        """Predicted days to the end of the run."""
        known = self.seconds and self.subject.steps
        return self.subject.steps * self.seconds / 86_400 if known else None

    def warnings(self) -> list[str]:
        """What deserves a second look."""
        if not self.walk:
            return []
        found, walk = [], self.walk
        waiting = walk.counts["collective-permute", "sync"]
        if waiting:
            found.append(
                f"{waiting} collective-permute(s) are synchronous: compute waits for them. On v5e a ring must follow "
                "neighbours on the grid of chips"
            )
        if walk.unknown_kernels:
            found.append(f"{walk.unknown_kernels} kernel call(s) state no FLOPs: their time is left out")
        if walk.unknown_loops:
            found.append(f"{walk.unknown_loops} loop(s) of unknown length are counted once")
        return found

    def to_json(self) -> dict[str, Any]:
        """Bytes and FLOPs are of one device unless the key says otherwise."""
        compiled, subject, walk = self.compiled, self.subject, self.walk
        days = self.days()
        return {
            "program": subject.title,
            "topology": self.name.text,
            "devices": self.name.devices,
            "device": self.chip.name if self.chip else "CPU",
            "mesh": dict(subject.mesh.shape),
            "batch_size": subject.batch_size,
            "parameters": subject.parameters,
            "trainable_parameters": subject.trainable,
            "argument_bytes": compiled.argument_bytes,
            "output_bytes": compiled.output_bytes,
            "temp_bytes": compiled.temp_bytes,
            "peak_bytes": compiled.peak_bytes,
            "needed_bytes": compiled.needed_bytes,
            "hbm_bytes": compiled.hbm_bytes,
            "fits": compiled.fits,
            "model_flops": subject.flops / self.name.devices,
            "all_devices_model_flops": subject.flops,
            "flops_formula": subject.formula,
            "ideal_seconds": self.ideal_seconds,
            "predicted_step_seconds": self.seconds,
            "predicted_compute_seconds": walk.compute_seconds if self.seconds else None,
            "predicted_exposed_seconds": walk.exposed_seconds if self.seconds else None,
            "predicted_mfu": self.mfu,
            "prediction": self.method,
            "kernel_utilisation": self.utilisation,
            "images_per_second": subject.batch_size / self.seconds if self.seconds else None,
            "collectives": walk.collectives() if walk else None,
            "steps": subject.steps,
            "days": days,
            "device_hours": days * 24 * self.name.devices if days else None,
            "compile_seconds": compiled.seconds,
            "warnings": self.warnings(),
        }


def make_plan(name: Name, subject: Subject, utilisation: float = KERNEL_UTILISATION) -> Plan:
    """Compile a subject for the devices it was made for, and read the program."""
    chip = chip_of(name)
    compiled = compile_subject(subject, chip)
    walk, method = None, "the compiler left no program to read"
    if compiled.argument_bytes is None:
        method = "a program that does not fit is not scheduled"
    if compiled.text:
        walk, method = predict(compiled.text, subject, chip, utilisation)
    return Plan(name, chip, subject, compiled, walk, method, utilisation)


def predict(text: str, subject: Subject, chip: Chip | None, utilisation: float) -> tuple[Walk, str]:
    """The walk over a program, and how its seconds were found; without a chip it counts collectives alone."""
    if chip is None:
        timing, method = (lambda *_: None), "no prediction for simulated devices"
    elif chip.clock:
        timing, method = cycles_timing(chip, utilisation), CYCLES
    else:
        timing, method = roofline_timing(chip), ROOFLINE
    fabric = Fabric(list(subject.mesh.devices.flat), chip)
    return Walker(hlo.parse(text), timing, fabric).run(), method
