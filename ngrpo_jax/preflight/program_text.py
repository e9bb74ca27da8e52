"""What a compiled program spends its time on, read from its text: collectives and estimated cycles.

Owns the reading of XLA's text. Must not know which program it is.

The TPU compiler writes its estimate of cycles at each instruction; collectives and Pallas kernels have none.
What is bound by memory it takes to reach about three quarters of the bandwidth. GPU programs have no cycles.
"""

import collections
import math
import re
from typing import Any, NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "s64": 8, "u64": 8}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")


class Instruction(NamedTuple):
    """One line of a program."""

    shape: str
    operation: str
    cycles: int
    text: str


class Cost(NamedTuple):
    """What running a program once costs a device, by its text.

    Attributes:
      cycles: of everything but collectives and Pallas kernels; 0 where the compiler tells none.
      collective_bytes: bytes that collectives give back, by their shape.
    """

    cycles: int
    collective_bytes: dict[str, int]


def cost(text: str) -> Cost:
    """The cost of `compiled.as_text()`: loops as often as they run, once where the program does not tell,
    and of a condition's branches the longest.

    On TPUs a collective that runs beside other work is part of several fusions, under one channel.
    """
    program, entry = _parse(text)
    moved: collections.Counter[str] = collections.Counter()

    def collectives(name: str) -> dict[Any, Instruction]:
        found: dict[Any, Instruction] = {}
        for one in program.get(name, []):
            if one.operation.removesuffix("-start") in COLLECTIVES:
                found[one.text] = one
            elif one.operation == "fusion":
                inside = collectives(_named("calls", one.text)).values()
                found |= {_channel(part): part for part in inside}
        return found

    def walk(name: str, times: int) -> int:
        cycles = 0
        for one in collectives(name).values():
            shape = re.sub(r"{[^}]*}", "", one.shape)
            moved[f"{one.operation.removesuffix('-start')} {shape}"] += _size(one) * times
        for one in program.get(name, []):
            cycles += one.cycles * times
            if one.operation == "while":
                cycles += walk(_named("body", one.text), times * _trips(program, one.text))
            elif one.operation == "conditional":
                cycles += walk(max(_branches(one.text), key=lambda name: len(program.get(name, []))), times)
            elif one.operation in ("call", "async-start"):
                cycles += walk(_named("calls|to_apply", one.text), times)
        return cycles

    return Cost(walk(entry, 1), dict(moved))


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Instructions by the name of their computation, and the name of the entry."""
    found: dict[str, list[Instruction]] = {}
    entry = current = ""
    for raw in text.split("\n"):
        line = re.sub(r"/\*index=\d+\*/", "", raw)
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            current = head[2]
            entry = current if head[1] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            cycles = re.search(r'"estimated_cycles":"?(\d+)', line)
            instruction = Instruction(match[2], match[3], int(cycles[1]) if cycles else 0, line)
            found.setdefault(current, []).append(instruction)
    return found, entry


def _named(key: str, text: str) -> str:
    match = re.search(rf"(?:{key})=%?([\w.\-]+)", text)
    return match[1] if match else ""


def _channel(one: Instruction) -> tuple[str, int]:
    """Equal for the parts of one collective."""
    channel = re.search(r"channel_id=(\d+)", one.text)
    return channel[1] if channel else one.text, _size(one)


def _branches(text: str) -> list[str]:
    many = re.search(r"branch_computations=\{([^}]*)\}", text)
    if many:
        return [name.strip(" %") for name in many[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", text)


def _trips(program: dict[str, list[Instruction]], text: str) -> int:
    """How often a loop runs: as it is noted, or the constant that its condition compares with; else 1."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', text)
    if known:
        return int(known[1])
    condition = "\n".join(one.text for one in program.get(_named("condition", text), []))
    bound = re.search(r" = [su]32\[\]\S* constant\((\d+)\)", condition)
    return int(bound[1]) if bound else 1


def _size(one: Instruction) -> int:
    """Bytes of a collective's results; where it starts alone, its shape has the operands before them."""
    shape = re.sub(r"{[^}]*}", "", one.shape)
    if one.operation.endswith("-start") and not one.operation.startswith("all-reduce"):
        shape = _entries(shape)[1]
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(math.prod(int(n) for n in dims.split(",") if n) * _BYTES.get(kind, 0) for kind, dims in arrays)


def _entries(shape: str) -> list[str]:
    """The entries of a tuple's shape, which may be tuples."""
    entries, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            entries.append("")
        else:
            entries[-1] += letter
    return entries
