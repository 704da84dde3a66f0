"""How long one instruction computes: by XLA's own cycles on a TPU, by a roofline of operations and bytes on a GPU."""

import math
import re
from collections.abc import Callable

from vlmjax.planning import hlo
from vlmjax.planning.chips import Chip

# Of what a kernel of our own states as its FLOPs, the share of the peak it is taken to reach.
KERNEL_UTILISATION = 0.92

_FREE = {
    "", "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "iota", "add-dependency", "opt-barrier", "while", "conditional", "call",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


def cycles_timing(chip: Chip, utilisation: float = KERNEL_UTILISATION) -> Callable:
    """Seconds by the cycles that XLA's TPU compiler schedules with; kernels by the FLOPs they state."""

    def seconds(module: hlo.Module, computation: str, instruction: hlo.Instruction) -> float | None:
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        if cycles:
            return int(cycles[1]) / chip.clock
        if instruction.opcode == "custom-call":
            stated = re.search(r'"flops":\s*"?(\d+)', instruction.attributes)
            return int(stated[1]) / (chip.peak * utilisation) if stated else None
        return None

    return seconds


def roofline_timing(chip: Chip) -> Callable:
    """Seconds no kernel can be faster than: its matrix products at peak, or its bytes at the memory's bandwidth."""

    def seconds(module: hlo.Module, computation: str, instruction: hlo.Instruction) -> float | None:
        if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
            return None
        operations = flops(module, computation, instruction)
        return max(operations / chip.peak, traffic(module, computation, instruction) / chip.bandwidth)

    return seconds


def flops(module: hlo.Module, computation: str, instruction: hlo.Instruction) -> int:
    """Operations of the matrix products in an instruction, two per multiply-add."""
    names = module.named(computation)
    if instruction.opcode == "fusion":
        called = instruction.called() or ""
        return sum(flops(module, called, inner) for inner in module.computations.get(called, ()))
    out = math.prod(hlo.dimensions(instruction.shape))
    left = hlo.dimensions(names[instruction.operands[0]].shape) if _known(instruction, names) else ()
    if instruction.opcode == "dot" or "__cublas$" in instruction.attributes:
        found = re.search(
            r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]([\d", ]*)[\]}]', instruction.attributes
        )
        axes = [int(axis) for axis in re.findall(r"\d+", found[1])] if found else []
        return 2 * out * math.prod(left[axis] for axis in axes) if left else 0
    if instruction.opcode == "convolution" and len(instruction.operands) > 1:
        labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
        kernel = hlo.dimensions(names[instruction.operands[1]].shape) if labels else ()
        return 2 * out * math.prod(kernel) // max(kernel[labels[1].index("o")], 1) if kernel else 0
    return 0


def _known(instruction: hlo.Instruction, names: dict[str, hlo.Instruction]) -> bool:
    return bool(instruction.operands) and all(name in names for name in instruction.operands)


def traffic(module: hlo.Module, computation: str, instruction: hlo.Instruction) -> int:
    """Bytes an instruction reads and writes in memory; of what it slices, only the slice."""
    names = module.named(computation)
    inside = module.inside(instruction) if instruction.opcode == "fusion" else [instruction]
    if instruction.opcode != "fusion":
        return _own_traffic(instruction, names)
    within = {inner.name: inner for inner in inside}
    parameters = {inner.name: int(inner.argument) for inner in inside if inner.opcode == "parameter"}
    total = 0
    for name in parameters:
        users = [inner for inner in inside if name in inner.operands]
        if users and all(_takes_a_slice(user, name) for user in users):
            total += sum(_slice_size(user, within) for user in users)
        else:
            total += hlo.size_of(within[name].shape)
    root = next((inner for inner in inside if inner.is_root), None)
    results = [within[name] for name in root.operands] if root and root.opcode == "tuple" else [root]
    for result in filter(None, results):
        updates = result.opcode == "dynamic-update-slice"
        total += _slice_size(result, within) if updates else hlo.size_of(result.shape)
    return total


def _takes_a_slice(user: hlo.Instruction, name: str) -> bool:
    return user.opcode in (*_SLICES, "dynamic-update-slice") and user.operands[0] == name


def _slice_size(instruction: hlo.Instruction, names: dict[str, hlo.Instruction]) -> int:
    """Bytes of the part that is taken, or of the part that is put in its place."""
    if instruction.opcode == "dynamic-update-slice":
        part = names.get(instruction.operands[1])
        return hlo.size_of(part.shape) if part else 0
    return hlo.size_of(instruction.shape)


def _own_traffic(instruction: hlo.Instruction, names: dict[str, hlo.Instruction]) -> int:
    if instruction.opcode in (*_SLICES, "dynamic-update-slice"):
        return 2 * _slice_size(instruction, names)
    read = sum(hlo.size_of(names[name].shape) for name in instruction.operands if name in names)
    return read + hlo.size_of(instruction.shape)
