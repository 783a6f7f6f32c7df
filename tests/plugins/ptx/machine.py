"""Runs a kernel: all threads of all blocks at once, one instruction at a time.

Threads that are at different instructions form groups. The group with the lowest instruction runs until it meets
another, a barrier or the end; so threads that parted at a branch meet again at the first instruction that both reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from tests.plugins.ptx import opcodes_float, opcodes_integer, opcodes_memory, opcodes_warp
from tests.plugins.ptx.ptx_parser import Instruction, Kernel, PtxError, parts
from tests.plugins.ptx.state import (
    Arithmetic,
    Launch,
    Mask,
    Read,
    State,
    Step,
    new_state,
    reader,
    whole_warps,
    writer,
)

TABLE: dict[str, Arithmetic] = opcodes_integer.TABLE | opcodes_float.TABLE
BARRIERS = ("bar.sync", "barrier.sync", "barrier.sync.aligned")
MOST_STEPS = 200_000
"""A launch of the tests executes some ten thousand instructions; one that passes this does not end."""
END = 1 << 30


class Kind(Enum):
    """How an instruction changes what runs next."""

    STEP = 0
    BRANCH = 1
    BARRIER = 2
    EXIT = 3


@dataclass(frozen=True)
class Bound:
    """An instruction, ready to run."""

    kind: Kind
    step: Step
    target: int = END
    guard: Read | None = None


def bind(kernel: Kernel) -> list[Bound]:
    """All instructions of a kernel. Raises PtxError, naming the instruction, for one that is not known."""
    bound = []
    for instruction in kernel.instructions:
        try:
            bound.append(_bound(instruction, kernel))
        except (PtxError, ValueError, IndexError) as error:
            raise PtxError(f"{kernel.name}: `{instruction.text}`: {error}") from error
    return bound


def _nothing(state: State, mask: Mask) -> None:
    """Control flow leaves registers alone."""


def _bound(instruction: Instruction, kernel: Kernel) -> Bound:
    guard = _guard(instruction, kernel)
    opcode = instruction.opcode
    if opcode in ("bra", "bra.uni"):
        return Bound(Kind.BRANCH, _nothing, kernel.labels[instruction.operands[0]], guard)
    if opcode in BARRIERS:
        if guard is not None or instruction.operands != ("0",):
            raise PtxError("only barrier 0, for all threads of a block, is supported")
        return Bound(Kind.BARRIER, _nothing)
    if opcode in ("ret", "exit"):
        return Bound(Kind.EXIT, _nothing, guard=guard)
    step = _step(instruction, kernel)
    return Bound(Kind.STEP, step if guard is None else _guarded(step, guard))


def _step(instruction: Instruction, kernel: Kernel) -> Step:
    opcode = instruction.opcode
    if opcode.startswith("mov.b") and any(operand.startswith("{") for operand in instruction.operands):
        return _pack(instruction, kernel)
    if opcode in TABLE:
        return TABLE[opcode].bind(instruction, kernel)
    step = opcodes_memory.bind(instruction, kernel) or opcodes_warp.bind(instruction, kernel)
    if step is None:
        raise PtxError(f"unknown opcode {opcode}")
    return step


def _guard(instruction: Instruction, kernel: Kernel) -> Read | None:
    if instruction.guard is None:
        return None
    read = reader(kernel, instruction.guard, "pred")
    return (lambda state: ~read(state)) if instruction.negated else read


def _guarded(step: Step, guard: Read) -> Step:
    def guarded(state: State, mask: Mask) -> None:
        chosen = np.broadcast_to(guard(state), state.size)
        chosen = chosen if mask is None else chosen & mask
        if chosen.any():
            step(state, None if chosen.all() else chosen)

    return guarded


def _pack(instruction: Instruction, kernel: Kernel) -> Step:
    """mov.b32 or mov.b64 between one register and the parts of it, lowest first."""
    target, source = (parts(operand) for operand in instruction.operands)
    whole_bits = int(instruction.opcode.removeprefix("mov.b"))
    part_bits = whole_bits // max(len(target), len(source))
    reads = [reader(kernel, text, f"b{whole_bits // len(source)}") for text in source]
    writes = [writer(kernel, text, f"b{whole_bits // len(target)}") for text in target]
    whole_type, part_type = np.dtype(f"u{whole_bits // 8}"), np.dtype(f"u{part_bits // 8}")

    def step(state: State, mask: Mask) -> None:
        whole = reads[0](state).astype(whole_type)
        for i, read in enumerate(reads[1:], 1):
            whole = whole | (read(state).astype(whole_type) << whole_type.type(i * part_bits))
        if len(writes) == 1:
            writes[0](state, whole, mask)
            return
        for i, write in enumerate(writes):
            write(state, (whole >> whole_type.type(i * part_bits)).astype(part_type), mask)

    return step


@dataclass
class Run:
    """One launch on its way."""

    kernel: Kernel
    code: list[Bound]
    state: State
    groups: dict[int, NDArray[np.bool_]] = field(default_factory=dict)  # next instruction -> lanes
    waiting: dict[int, NDArray[np.bool_]] = field(default_factory=dict)  # barrier -> lanes that reached it
    steps: int = 0

    def run(self) -> None:
        """To the end of all threads."""
        self.groups[0] = np.ones(self.state.size, dtype=np.bool_)
        with np.errstate(all="ignore"):
            while self.groups or self.waiting:
                if not self.groups:
                    self._release_barriers()
                counter = min(self.groups)
                self._run_group(counter, self.groups.pop(counter))
        if self.state.shared.copies:
            raise PtxError(f"{self.kernel.name}: threads end while their cp.async is under way")

    def _run_group(self, counter: int, lanes: NDArray[np.bool_]) -> None:
        """Until the lanes reach another group, part, wait or end."""
        state, code = self.state, self.code
        mask: Mask = None if lanes.all() else lanes
        stop = min(self.groups, default=END)
        first = counter
        try:
            while counter != stop:
                bound = code[counter]
                if bound.kind is not Kind.STEP:
                    _CONTROL[bound.kind](self, counter, bound, lanes)
                    break
                bound.step(state, mask)
                counter += 1
            else:
                self._join(self.groups, counter, lanes)
        except PtxError as error:
            raise PtxError(f"{self.kernel.name}: `{self.kernel.instructions[counter].text}`: {error}") from error
        self.steps += counter - first + 1
        if self.steps > MOST_STEPS:
            raise PtxError(f"{self.kernel.name}: more than {MOST_STEPS} steps: it does not end")

    @staticmethod
    def _join(groups: dict[int, NDArray[np.bool_]], counter: int, lanes: NDArray[np.bool_]) -> None:
        if lanes.any():
            groups[counter] = groups[counter] | lanes if counter in groups else lanes

    def _branch(self, counter: int, bound: Bound, lanes: NDArray[np.bool_]) -> None:
        if bound.guard is None:
            self._join(self.groups, bound.target, lanes)
            return
        taken = lanes & bound.guard(self.state)
        self._join(self.groups, bound.target, taken)
        self._join(self.groups, counter + 1, lanes & ~taken)

    def _wait(self, counter: int, bound: Bound, lanes: NDArray[np.bool_]) -> None:
        whole_warps(self.state, lanes)
        self._join(self.waiting, counter, lanes)

    def _exit(self, counter: int, bound: Bound, lanes: NDArray[np.bool_]) -> None:
        ended = lanes if bound.guard is None else lanes & bound.guard(self.state)
        self._join(self.groups, counter + 1, lanes & ~ended)

    def _release_barriers(self) -> None:
        """Blocks whose threads have all come to one barrier go on.

        Raises:
            PtxError: Threads of a block wait at different barriers, or some ended without coming to it.
        """
        launch = self.state.launch
        blocks = math.prod(launch.grid)
        for counter, lanes in self.waiting.items():
            arrived = lanes.reshape(blocks, launch.block)
            if (arrived.any(axis=1) != arrived.all(axis=1)).any():
                block = int(np.flatnonzero(arrived.any(axis=1) != arrived.all(axis=1))[0])
                count = int(arrived[block].sum())
                text = f"{count} of {launch.block} threads of block {block} wait at a barrier, the others do not come"
                raise PtxError(f"{self.kernel.name}: instruction {counter}: {text}")
            self.state.shared.epoch[arrived.any(axis=1)] += 1
            self._join(self.groups, counter + 1, lanes)
        self.waiting.clear()


_CONTROL: dict[Kind, Callable[[Run, int, Bound, NDArray[np.bool_]], None]] = {
    Kind.BRANCH: Run._branch,
    Kind.BARRIER: Run._wait,
    Kind.EXIT: Run._exit,
}


def execute(kernel: Kernel, code: list[Bound], launch: Launch) -> int:
    """Run one launch; memory is changed. Returns the number of steps.

    Raises:
        PtxError: The kernel broke a rule.
    """
    if len(launch.parameters) != kernel.param_bytes:
        raise PtxError(f"{kernel.name}: {len(launch.parameters)} bytes of parameters, not {kernel.param_bytes}")
    run = Run(kernel, code, new_state(kernel, launch))
    run.run()
    return run.steps
