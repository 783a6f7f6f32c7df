"""A reader of what `nvdisasm -c` and `cuobjdump -res-usage` print: functions, their loops, their registers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "Function",
    "Instruction",
    "Resources",
    "functions_from_sass",
    "main_loop",
    "mnemonic_counts",
    "resources_from_text",
    "returning_calls",
]

_FUNCTION = re.compile(r"\.text\.(\S+):$")
_LABEL = re.compile(r"(\.L_\S+):$")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L_\S+?)\)")
_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


class Instruction(NamedTuple):
    """One line of machine code."""

    opcode: str
    """With its suffixes: `IMMA.16832.S8.S8`."""
    operands: str
    predicate: str | None = None

    @property
    def mnemonic(self) -> str:
        """The opcode without suffixes: `IMMA`."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> str | None:
        """The label that a jump or a call goes to."""
        found = _TARGET.search(self.operands)
        return found.group(1) if found else None


@dataclass(frozen=True)
class Function:
    """The code of a kernel."""

    name: str
    """Mangled."""
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """Label -> index of the instruction behind it."""


@dataclass(frozen=True)
class Resources:
    """What a thread takes: registers, and bytes of stack and of local memory."""

    registers: int
    stack: int
    local: int


def functions_from_sass(text: str) -> dict[str, Function]:
    """Every function of a listing by `nvdisasm -c`, by its mangled name."""
    found: dict[str, Function] = {}
    name: str | None = None
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if code := _INSTRUCTION.match(line):  # most lines: tried first, a listing has 300,000
            predicate, opcode, operands = code.groups()
            instructions.append(Instruction(opcode, operands.rstrip(), predicate))
        elif label := _LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif start := _FUNCTION.match(line):
            if name is not None:
                found[name] = Function(name, tuple(instructions), labels)
            name, instructions, labels = start.group(1), [], {}
    if name is not None:
        found[name] = Function(name, tuple(instructions), labels)
    return found


def main_loop(function: Function, mnemonic: str = "IMMA") -> tuple[Instruction, ...]:
    """The loop with the most instructions of a kind: from the label of a backward branch to that branch.

    Raises:
        ValueError: No loop contains one.
    """
    best: tuple[Instruction, ...] = ()
    most = 0
    for end, instruction in enumerate(function.instructions):
        if instruction.mnemonic != "BRA" or instruction.target is None:
            continue
        start = function.labels.get(instruction.target, end + 1)
        body = function.instructions[start : end + 1]
        count = sum(each.mnemonic == mnemonic for each in body)
        if count > most:
            best, most = body, count
    if not best:
        raise ValueError(f"{function.name}: no loop contains {mnemonic}")
    return best


def mnemonic_counts(instructions: tuple[Instruction, ...]) -> Counter[str]:
    """How often each mnemonic occurs."""
    return Counter(instruction.mnemonic for instruction in instructions)


def returning_calls(function: Function, instructions: tuple[Instruction, ...]) -> list[Instruction]:
    """Calls among `instructions` that may come back.

    ptxas also writes `CALL.REL.NOINC` for a far jump out of a loop. Such a call goes to a label of the same function
    from which no RET is reached: it cannot come back.
    """
    calls = []
    for call in instructions:
        if call.mnemonic not in {"CALL", "JCAL"}:
            continue
        start = function.labels.get(call.target or "")
        if start is None or _reaches_return(function, start):
            calls.append(call)
    return calls


def _reaches_return(function: Function, start: int) -> bool:
    """Whether control can get from an instruction to a RET. A call on the way is taken to come back."""
    waiting, seen = [start], set[int]()
    while waiting:
        index = waiting.pop()
        if index in seen or index >= len(function.instructions):
            continue
        seen.add(index)
        instruction = function.instructions[index]
        if instruction.mnemonic in {"RET", "BRX", "JMX"}:  # an indirect jump may go anywhere
            return True
        if instruction.mnemonic == "BRA" and instruction.target in function.labels:
            waiting.append(function.labels[instruction.target])
        if instruction.mnemonic not in {"BRA", "EXIT"} or instruction.predicate is not None:
            waiting.append(index + 1)
    return False


def resources_from_text(text: str) -> dict[str, Resources]:
    """What `cuobjdump -res-usage` says, by mangled name."""
    return {name: Resources(*map(int, numbers)) for name, *numbers in _RESOURCES.findall(text)}
