"""A walk over a scheduled program: compute time with loops counted out, collectives, and what they do not hide."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable

from vlmjax.planning import hlo
from vlmjax.planning.fabric import KINDS, Fabric, first_group

START, DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"  # custom calls by which a TPU marks a fusion
_COPIES = ("async-start", "async-done", "async-update")
Timing = Callable[[hlo.Module, str, hlo.Instruction], float | None]


@dataclasses.dataclass
class Walk:
    """What was found, per device and call of the program."""

    compute_seconds: float = 0.0
    exposed_seconds: float = 0.0  # of collectives, those nothing hides
    counts: Counter = dataclasses.field(default_factory=Counter)  # by (kind, "sync" or "async")
    sizes: Counter = dataclasses.field(default_factory=Counter)  # bytes by kind
    timed: int = 0  # instructions with an estimate, each counted once
    unknown_kernels: int = 0  # calls of kernels without one, as often as they run
    unknown_loops: int = 0  # whiles of unknown length, counted as one round

    def add(self, other: "Walk", times: int) -> None:
        """Add what `times` runs of a computation do."""
        self.compute_seconds += times * other.compute_seconds
        self.exposed_seconds += times * other.exposed_seconds
        for mine, theirs in ((self.counts, other.counts), (self.sizes, other.sizes)):
            for key, value in theirs.items():
                mine[key] += times * value
        self.timed += other.timed
        self.unknown_kernels += times * other.unknown_kernels
        self.unknown_loops += other.unknown_loops

    def collectives(self) -> dict[str, dict[str, int]]:
        """By kind: how many are `sync` and `async`, and their `bytes`."""
        return {
            kind: {"sync": self.counts[kind, "sync"], "async": self.counts[kind, "async"], "bytes": int(size)}
            for kind, size in sorted(self.sizes.items())
        }


class Walker:
    """Follows a program from its entry. `timing` says how long an instruction computes, None where nobody knows."""

    def __init__(self, module: hlo.Module, timing: Timing, fabric: Fabric):
        """Nothing is read yet."""
        self.module, self.timing, self.fabric = module, timing, fabric
        self._known: dict[str, Walk] = {}

    def run(self) -> Walk:
        """The whole program."""
        return self._computation(self.module.entry)

    def _computation(self, name: str) -> Walk:
        if name not in self._known:
            self._known[name] = Walk()  # a program does not call itself
            self._known[name] = _Computation(self, name).walk
        return self._known[name]


class _Computation:
    """One computation, instruction by instruction in the order of the schedule."""

    def __init__(self, walker: Walker, name: str):
        self.walker, self.name, self.walk = walker, name, Walk()
        self.received: dict[str, str] = {}  # recv -> the name of its transfer
        self.open: dict[str, tuple[float, float]] = {}  # transfer -> (compute before it began, its length)
        for instruction in walker.module.computations.get(name, ()):
            self._step(instruction)
        for started, seconds in list(self.open.values()):  # its end is in the next round of a loop
            self._close(started, seconds)

    def _step(self, instruction: hlo.Instruction) -> None:
        module, opcode = self.walker.module, instruction.opcode
        if opcode == "while":
            times = hlo.trip_count(module, instruction, self.name)
            self.walk.unknown_loops += times is None
            body = self.walker._computation(instruction.called("body") or "")
            self.walk.add(body, 1 if times is None else times)
        elif opcode == "conditional":
            self._branches(instruction)
        elif opcode == "call":
            self.walk.add(self.walker._computation(instruction.called("to_apply") or ""), 1)
        elif opcode in _COPIES or opcode.startswith(KINDS):
            self._collective(instruction)
        elif opcode in ("send", "recv", "recv-done"):
            self._between_slices(instruction)
        elif opcode == "fusion" and self._fused(instruction):
            pass
        else:
            self._compute(instruction)

    def _compute(self, instruction: hlo.Instruction) -> None:
        seconds = self.walker.timing(self.walker.module, self.name, instruction)
        if seconds is not None:
            self.walk.timed += 1
            self.walk.compute_seconds += seconds
        elif (
            instruction.opcode == "custom-call"
            and 'custom_call_target="tpu_custom_call"' in instruction.attributes
        ):
            self.walk.unknown_kernels += 1

    def _branches(self, instruction: hlo.Instruction) -> None:
        """The slowest branch, for any of them may be the one that is taken."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = re.findall(r"%?([\w.<>\-]+)", listed[1]) if listed else []
        names += filter(None, (instruction.called(f"{value}_computation") for value in ("true", "false")))
        walks = [self.walker._computation(name) for name in names]
        if walks:
            self.walk.add(max(walks, key=lambda walk: walk.compute_seconds + walk.exposed_seconds), 1)

    def _collective(self, instruction: hlo.Instruction) -> None:
        """A collective that stands alone: at once, or as a pair of start and done with work between them."""
        opcode = instruction.opcode
        if opcode.endswith("-done"):
            for operand in instruction.operands:
                if operand in self.open:
                    self._close(*self.open.pop(operand))
            return
        if opcode == "async-update":  # goes on under its own name
            for operand in instruction.operands:
                if operand in self.open:
                    self.open[instruction.name] = self.open.pop(operand)
            return
        inner = instruction
        if opcode == "async-start":
            called = self.walker.module.inside(instruction)
            inner = next((i for i in called if i.opcode.startswith(KINDS)), None)
            if inner is None:  # a copy, or a computation on a thread of its own
                return
        kind, size = kind_of(inner), whole_size(inner, len(self._group(inner)))
        if opcode.endswith("-start"):
            self._begin(instruction.name, kind, size, inner.attributes)
        else:
            self._at_once(kind, size, inner.attributes)

    def _between_slices(self, instruction: hlo.Instruction) -> None:
        """A TPU's transfers between slices go through its hosts: sent, and received under the same name."""
        if instruction.opcode == "recv-done":
            name = self.received.get(instruction.operands[0] if instruction.operands else "", "")
            if name in self.open:
                self._close(*self.open.pop(name))
            return
        name = re.search(r'_xla_host_transfer_rendezvous="([^"]+)"', instruction.attributes)
        kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        if name and instruction.opcode == "recv":
            self.received[instruction.name] = name[1]
        elif name and kind:
            first = next((f"{dtype}{list(sizes)}" for dtype, sizes in hlo.arrays(instruction.shape)), "")
            size, how = hlo.size_of(first), kind[1].lower().replace("_", "-")
            self._count(f"{how} between slices", "async", size)
            self.open[name[1]] = (self.walk.compute_seconds, self.walker.fabric.between_slices(how, size))

    def _fused(self, instruction: hlo.Instruction) -> bool:
        """A fusion with a collective inside: on a TPU the start, a part, the end, or the whole of one.

        Returns whether nothing is computed in it beside.
        """
        inside = self.walker.module.inside(instruction)
        inner = next((i for i in inside if i.opcode.startswith(KINDS)), None)
        if inner is None:
            return False
        marks = " ".join(i.attributes for i in inside if i.opcode == "custom-call")
        chain = re.search(r'chain_id="(\d+)"', inner.attributes)
        key = f"chain {chain[1]}" if chain else ""
        kind, size = kind_of(inner), whole_size(inner, len(self._group(inner)))
        if f'"{START}"' in marks:
            self._begin(key or instruction.name, kind, size, inner.attributes)
        elif f'"{DONE}"' in marks:
            if key in self.open:
                self._close(*self.open.pop(key))
        elif chain is None:
            if kind == "all-reduce" and any("slice" in i.opcode for i in inside):
                kind = "reduce-scatter"  # a TPU spells it as a sum of which each device keeps its slice
            self._at_once(kind, size, inner.attributes)
            return True
        self._compute(instruction)  # a part: other work goes on in the same fusion
        return True

    def _group(self, instruction: hlo.Instruction) -> list[int]:
        return first_group(instruction.attributes, len(self.walker.fabric.places))

    def _begin(self, key: str, kind: str, size: int, attributes: str) -> None:
        self._count(kind, "async", size)
        self.open[key] = (self.walk.compute_seconds, self.walker.fabric.seconds(kind, size, attributes))

    def _close(self, started: float, seconds: float) -> None:
        self.walk.exposed_seconds += max(0.0, seconds - (self.walk.compute_seconds - started))

    def _at_once(self, kind: str, size: int, attributes: str) -> None:
        self._count(kind, "sync", size)
        self.walk.exposed_seconds += self.walker.fabric.seconds(kind, size, attributes)

    def _count(self, kind: str, how: str, size: int) -> None:
        self.walk.counts[kind, how] += 1
        self.walk.sizes[kind] += size


def kind_of(instruction: hlo.Instruction) -> str:
    """The kind of a collective without the half of it that an instruction is."""
    return instruction.opcode.removesuffix("-start")


def whole_size(instruction: hlo.Instruction, group: int) -> int:
    """Bytes of a collective's buffer before it is cut or after it is put together."""
    kind = kind_of(instruction)
    if not instruction.opcode.endswith("-start") or kind == "all-reduce":
        size = hlo.size_of(instruction.shape)
        return size * group if kind == "reduce-scatter" else size
    # What begins now shows what it takes beside what it gives, and numbers of its own.
    size = sum(
        hlo.size_of(f"{dtype}{list(sizes)}") for dtype, sizes in hlo.arrays(instruction.shape) if sizes
    )
    return size * group // (group + 1) if kind in ("all-gather", "reduce-scatter") else size // 2
