"""XLA's scheduled program as text, read into instructions: enough of the format to follow time and traffic."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = re.compile(r"\d+")
_ARRAY = re.compile(r"\b(pred|[subf]\w*?\d+\w*|c64|c128)\[([\d, ]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.<>\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.<>\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_REFERENCE = re.compile(r"%([\w.<>\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")


class Instruction(NamedTuple):
    """One line: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool
    argument: str  # between the parentheses as it stands: a constant's value, a parameter's number

    def called(self, key: str = "calls") -> str | None:
        """The computation under `calls=`, `body=`, `condition=` or `to_apply=`."""
        match = re.search(rf"\b{key}=%?([\w.<>\-]+)", self.attributes)
        return match and match[1]


class Module(NamedTuple):
    """The computations of a program by name, each a list of instructions in the order they run in."""

    computations: dict[str, list[Instruction]]
    entry: str

    def named(self, computation: str) -> dict[str, Instruction]:
        """The instructions of a computation by name."""
        return {instruction.name: instruction for instruction in self.computations.get(computation, ())}

    def inside(self, instruction: Instruction) -> list[Instruction]:
        """The instructions of what a fusion (or another caller) calls."""
        return self.computations.get(instruction.called() or "", [])


def parse(text: str) -> Module:
    """Read `compiled.as_text()`.

    Raises ValueError for text without an entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in _whole_lines(text):
        if not line.startswith(" "):
            header = _COMPUTATION.match(line)
            current = computations.setdefault(header[2], []) if header else None
            if header and header[1]:
                entry = header[2]
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_instruction(found[2], found[3], bool(found[1])))
    if not entry:
        raise ValueError("no ENTRY computation in this text: it is no HLO module")
    return Module(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines that are not empty, each with those that go on with it: a kernel's metadata may have breaks of its own."""
    whole = ""
    for line in text.splitlines():
        begins = _INSTRUCTION.match(line) or _COMPUTATION.match(line) or line.rstrip() in ("", "}")
        if whole and not begins and _INSTRUCTION.match(whole):
            whole += line
            continue
        if whole:
            yield whole
        whole = line.rstrip()
    if whole:
        yield whole


def _instruction(name: str, line: str, is_root: bool) -> Instruction:
    line = _COMMENT.sub("", line)
    end = _closing(line, 0) + 1 if line.startswith("(") else line.find(" ")
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return Instruction(name, line, "", (), "", is_root, "")
    close = _closing(line, opcode.end() - 1)
    argument = line[opcode.end() : close]
    operands = tuple(_REFERENCE.findall(argument))
    return Instruction(name, line[:end], opcode[1], operands, line[close + 1 :], is_root, argument)


def _closing(line: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(line) - 1


def arrays(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of each array in a shape; a tuple's own in order."""
    for dtype, sizes in _ARRAY.findall(shape):
        yield dtype, tuple(int(size) for size in sizes.split(",") if size.strip())


def dimensions(shape: str) -> tuple[int, ...]:
    """The dimensions of a shape's first array."""
    return next(arrays(shape), ("", ()))[1]


def size_of(shape: str) -> int:
    """Bytes of a shape, a tuple's the sum of its parts. Padding of tiled layouts is not counted."""
    return sum(math.ceil(math.prod(sizes) * _bits(dtype) / 8) for dtype, sizes in arrays(shape))


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(_BITS.search(dtype)[0])


def trip_count(module: Module, loop: Instruction, computation: str) -> int | None:
    """How often a `while` runs its body: as XLA notes it, or from `i < constant` in its condition, else None."""
    noted = re.search(r'known_trip_count\\?":\s*\{\\?"n\\?":\\?"(\d+)', loop.attributes)
    if noted:
        return int(noted[1])
    condition = module.named(loop.called("condition") or "")
    compare = next((i for i in condition.values() if i.is_root), None)
    if compare is None or compare.opcode not in ("compare", "fusion"):
        return None
    direction = compare.attributes
    if compare.opcode == "fusion":
        direction = " ".join(i.attributes for i in module.inside(compare) if i.opcode == "compare")
    operands = [_through(condition, name) for name in compare.operands]
    bounds = [int(i.argument) for i in operands if i and i.opcode == "constant" and "[]" in i.shape]
    counters = [i for i in operands if i and i.opcode == "get-tuple-element"]
    if len(bounds) != 1 or len(counters) != 1 or not re.search(r"direction=L[TE]", direction):
        return None
    first = _initial(module.named(computation), loop, counters[0]) or 0
    return max(bounds[0] - first + ("direction=LE" in direction), 0)


def _through(names: dict[str, Instruction], name: str) -> Instruction | None:
    """An instruction behind copies."""
    found = names.get(name)
    while found and found.opcode in ("copy", "bitcast") and found.operands:
        found = names.get(found.operands[0])
    return found


def _initial(names: dict[str, Instruction], loop: Instruction, counter: Instruction) -> int | None:
    """What a loop's counter starts with, where that is a constant beside the loop."""
    place = re.search(r"index=(\d+)", counter.attributes)
    start = _through(names, loop.operands[0]) if loop.operands else None
    if not place or not start or start.opcode != "tuple" or int(place[1]) >= len(start.operands):
        return None
    value = _through(names, start.operands[int(place[1])])
    return int(value.argument) if value and value.opcode == "constant" else None
