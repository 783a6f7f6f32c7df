"""PTX text as instructions: the part of the grammar that nvcc writes for one function a time, by regular expressions.

Source: NVIDIA, Parallel Thread Execution ISA, "Syntax" and "State Spaces, Types and Variables". What is outside of that
part (functions, local and static shared variables, nested declarations) is refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

REGISTER_BYTES = {
    "pred": 1,
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (16, 32, 64)},
    "f32": 4,
    "f64": 8,
}
SHARED_SYMBOL_ADDRESS = 1024
"""Where dynamic shared memory starts. Not at 0, so that a null address is out of bounds; aligned for every access."""

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{(.*)\}\s*$", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]")
_SHARED = re.compile(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]\s*;")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.+)$")
_REGISTER = re.compile(r"\s*(%?\w+)(?:<(\d+)>)?\s*$")
_BRACES = re.compile(r"[\s{}]*")
_LABEL = re.compile(r"([$\w]+):(?!:)")
_INSTRUCTION = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z]\S*)\s*(.*)$", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


class PtxError(RuntimeError):
    """The text cannot be read, or running it broke a rule of the PTX ISA."""


@dataclass(frozen=True)
class Instruction:
    """One statement: `@guard opcode operands`."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    text: str


@dataclass(frozen=True)
class Kernel:
    """One entry function."""

    name: str
    param_name: str
    param_bytes: int
    registers: dict[str, tuple[int, int]] = field(repr=False)  # name -> (number, bytes); predicates have 1 byte
    instructions: tuple[Instruction, ...] = field(repr=False)
    labels: dict[str, int] = field(repr=False)  # label -> number of the next instruction
    shared_symbols: frozenset[str] = frozenset()


def kernel_texts(module: str) -> dict[str, str]:
    """Text of each entry function of a module, with the declarations at its top."""
    head, *entries = re.split(r"(?=\.visible\s+\.entry)", _COMMENT.sub("", module))
    if re.search(r"\.func\b", head) or any(re.search(r"\.func\b", entry) for entry in entries):
        raise PtxError("functions (.func) are not supported")
    texts = {}
    for entry in entries:
        match = _ENTRY.search(entry)
        if match is None:
            raise PtxError(f"not an entry function: {entry[:80]!r}")
        texts[match[1]] = head + entry
    return texts


def kernel_from_text(text: str) -> Kernel:
    """One entry function, as `kernel_texts` gives it.

    Raises:
        PtxError: A statement is outside of the grammar.
    """
    match = _ENTRY.search(_COMMENT.sub("", text))
    if match is None:
        raise PtxError("no entry function")
    name, parameters, _, body = match.groups()
    declared = _PARAMETER.findall(parameters)
    if len(declared) != 1 or parameters.count(".param") != 1:
        raise PtxError(f"{name}: expected one parameter that is a struct, got {parameters.strip()!r}")
    body_reader = _Body()
    for statement in body.split(";"):
        body_reader.read(statement)
    shared = frozenset(_SHARED.findall(text))
    registers, instructions, labels = body_reader.registers, tuple(body_reader.instructions), body_reader.labels
    return Kernel(name, declared[0][1], int(declared[0][2]), registers, instructions, labels, shared)


@dataclass
class _Body:
    """What the statements so far have declared."""

    registers: dict[str, tuple[int, int]] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    scopes: list[dict[str, str]] = field(default_factory=list)
    """Registers of each open nested scope: name in the text -> name of its own."""

    def read(self, text: str) -> None:
        """One statement, with the braces and labels before it."""
        statement = self._entered(text)
        while label := _LABEL.match(statement):
            self.labels[label[1]] = len(self.instructions)
            statement = self._entered(statement[label.end() :])
        if statement.startswith(".reg"):
            self._declare(statement)
        elif statement.startswith("."):
            if not statement.startswith(".pragma"):
                raise PtxError(f"unsupported declaration: {statement}")
        elif statement:
            for scope in self.scopes:
                for name, own in scope.items():
                    statement = re.sub(rf"(?<![%\w]){re.escape(name)}(?!\w)", own, statement)
            self.instructions.append(_instruction(statement))

    def _entered(self, statement: str) -> str:
        """The statement without the braces of scopes, which stand before it: those of operands stay."""
        braces = _BRACES.match(statement)
        assert braces is not None
        for brace in braces[0].split():
            for character in brace:
                if character == "{":
                    self.scopes.append({})
                else:
                    self.scopes.pop()
        return statement[braces.end() :].strip()

    def _declare(self, statement: str) -> None:
        match = _REGISTERS.match(statement)
        if match is None or match[1] not in REGISTER_BYTES:
            raise PtxError(f"unsupported declaration: {statement}")
        for text in match[2].split(","):
            named = _REGISTER.match(text)
            if named is None:
                raise PtxError(f"unsupported declaration: {statement}")
            prefix, count = named.groups()
            for name in [f"{prefix}{i}" for i in range(int(count))] if count else [prefix]:
                self._add_register(name, REGISTER_BYTES[match[1]])

    def _add_register(self, name: str, size: int) -> None:
        own = f"{name}.{len(self.registers)}" if self.scopes else name
        if own in self.registers:
            raise PtxError(f"{name} is declared twice")
        self.registers[own] = (len(self.registers), size)
        if self.scopes:
            self.scopes[-1][name] = own


def _instruction(statement: str) -> Instruction:
    match = _INSTRUCTION.match(statement)
    if match is None:
        raise PtxError(f"not an instruction: {statement}")
    negation, guard, opcode, rest = match.groups()
    text = " ".join(statement.split())
    return Instruction(opcode, tuple(_OPERAND.findall(rest)), guard, negation == "!", text)


def parts(operand: str) -> tuple[str, ...]:
    """Members of a vector operand `{a, b}`; any other operand alone."""
    if operand.startswith("{"):
        return tuple(part.strip() for part in operand.strip("{}").split(","))
    return (operand,)


def address(operand: str) -> tuple[str, int]:
    """Base and offset in bytes of `[base+offset]`."""
    base, _, offset = operand.strip("[]").replace(" ", "").partition("+")
    return base, int(offset, 0) if offset else 0
