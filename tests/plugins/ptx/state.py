"""What a launch knows while it runs, and how instructions read and write registers.

All threads of all blocks are the lanes of numpy arrays, block after block. A register is an array of unsigned integers
of its width (predicates: bool), one element a lane, or one element for all lanes where they agree. Arrays are never
changed in place, so a `mov` may share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.plugins.ptx.memory import GlobalMemory, SharedMemory
from tests.plugins.ptx.ptx_parser import SHARED_SYMBOL_ADDRESS, Instruction, Kernel, PtxError

Lanes = NDArray[Any]
Mask = NDArray[np.bool_] | None
"""Lanes that execute; None: all."""

TYPES: dict[str, np.dtype[Any]] = {
    "pred": np.dtype(np.bool_),
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),  # numpy has no such type; the conversions know its bits
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
}
POISON = 0xA5
"""Byte of registers that were never written."""
WARP = 32


@dataclass
class Launch:
    """Grid, block, parameters and memory of one kernel start."""

    grid: tuple[int, int, int]
    block: int
    shared_bytes: int
    parameters: bytes
    memory: GlobalMemory


@dataclass
class State:
    """Registers and memory of a running launch."""

    launch: Launch
    shared: SharedMemory
    registers: list[Lanes]
    special: dict[str, Lanes]
    lanes: NDArray[np.int64] = field(repr=False)  # 0, 1, ...
    ctas: NDArray[np.int64] = field(repr=False)  # block of each lane

    @property
    def size(self) -> int:
        """Number of lanes."""
        return len(self.lanes)

    def selected(self, mask: Mask) -> NDArray[np.int64]:
        """Numbers of the executing lanes."""
        return self.lanes if mask is None else np.flatnonzero(mask)


Step = Callable[[State, Mask], None]
Read = Callable[[State], Lanes]
Write = Callable[[State, Lanes, Mask], None]


def new_state(kernel: Kernel, launch: Launch) -> State:
    """The state before the first instruction."""
    if launch.block % WARP:
        raise PtxError(f"{launch.block} threads a block: only whole warps are supported")
    blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
    lanes = np.arange(blocks * launch.block)
    ctas, thread = np.divmod(lanes, launch.block)
    x, y, z = ctas % launch.grid[0], ctas // launch.grid[0] % launch.grid[1], ctas // (launch.grid[0] * launch.grid[1])
    values = {"%tid.x": thread, "%laneid": thread % WARP, "%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z}
    sizes = {"%ntid.x": launch.block, **{f"%nctaid.{axis}": n for axis, n in zip("xyz", launch.grid, strict=True)}}
    one = {"%tid.y": 0, "%tid.z": 0, "%ntid.y": 1, "%ntid.z": 1, **sizes}
    special = {name: value.astype(np.uint32) for name, value in values.items()}
    special |= {name: np.array([value], dtype=np.uint32) for name, value in one.items()}
    registers = [_poisoned(size) for _, size in kernel.registers.values()]
    return State(launch, SharedMemory(blocks, launch.shared_bytes), registers, special, lanes, ctas)


def _poisoned(size: int) -> Lanes:
    """A register of `size` bytes that was never written."""
    return np.array([POISON] * size, dtype=np.uint8).view(unsigned(size)) if size > 1 else np.array([True])


def unsigned(size: int) -> np.dtype[Any]:
    """How a register of `size` bytes is kept."""
    return np.dtype(np.bool_) if size == 1 else np.dtype(f"u{size}")


def immediate(text: str, type_: str) -> Lanes | None:
    """One element of the type, or None where the text is no number."""
    dtype = TYPES[type_]
    if text.startswith(("0f", "0F")) and type_ in ("f32", "b32"):
        return np.array([int(text[2:], 16)], dtype=np.uint32).view(dtype)
    try:
        value = int(text.rstrip("U"), 0)
    except ValueError:
        return None
    if type_ == "pred":
        return np.array([value != 0])
    if dtype.kind == "f":
        raise PtxError(f"{text} is no {type_}")
    raw = value & ((1 << (8 * dtype.itemsize)) - 1)
    return np.array([raw], dtype=f"u{dtype.itemsize}").view(dtype)


def reader(kernel: Kernel, text: str, type_: str) -> Read:
    """Reads an operand as a type: a register (its low bits where it is wider), a number, or the shared symbol."""
    dtype = TYPES[type_]
    if text in kernel.registers:
        number, size = kernel.registers[text]
        if unsigned(size) == dtype:
            return lambda state: state.registers[number]
        if size == dtype.itemsize and size > 1:
            return lambda state: state.registers[number].view(dtype)
        if size > dtype.itemsize:
            low = np.dtype(f"u{dtype.itemsize}")
            return lambda state: state.registers[number].astype(low).view(dtype)
        raise PtxError(f"{text} has {8 * size} bits, read as {type_}")
    if text.startswith("%"):
        return _special_reader(text, dtype)
    if text in kernel.shared_symbols:
        text = str(SHARED_SYMBOL_ADDRESS)
    constant = immediate(text, type_)
    if constant is None:
        raise PtxError(f"unknown operand {text!r}")
    return lambda state: constant


def _special_reader(text: str, dtype: np.dtype[Any]) -> Read:
    if dtype.itemsize != 4:
        raise PtxError(f"{text} is read as {dtype}")

    def read(state: State) -> Lanes:
        if text not in state.special:
            raise PtxError(f"unknown special register {text}")
        return state.special[text].view(dtype)

    return read


def writer(kernel: Kernel, text: str, type_: str) -> Write:
    """Writes a register; a narrower value is extended by its sign, or by zeros."""
    if text == "_":
        return lambda state, value, mask: None
    if text not in kernel.registers:
        raise PtxError(f"{text!r} is no register")
    number, size = kernel.registers[text]
    dtype = unsigned(size)
    source = TYPES[type_]
    if (type_ == "pred") != (size == 1) or source.itemsize > size:
        raise PtxError(f"{text} has {8 * size} bits, written as {type_}")
    extended = np.dtype(f"i{size}") if source.kind == "i" else dtype
    bits = np.dtype(f"u{source.itemsize}") if source.kind == "f" else source

    def write(state: State, value: Lanes, mask: Mask) -> None:
        raw = value.view(bits) if bits != source else value
        if raw.dtype != dtype:
            raw = raw.astype(extended, copy=False).view(dtype)
        state.registers[number] = raw if mask is None else np.where(mask, raw, state.registers[number])

    return write


@dataclass(frozen=True)
class Arithmetic:
    """An instruction that makes one value of each lane's sources: `function(*sources)`."""

    function: Callable[..., Lanes]
    result: str
    sources: tuple[str, ...]

    def bind(self, instruction: Instruction, kernel: Kernel) -> Step:
        """The step of one instruction."""
        target, *operands = instruction.operands
        if len(operands) != len(self.sources):
            raise PtxError(f"{len(self.sources)} sources expected")
        reads = [reader(kernel, text, type_) for text, type_ in zip(operands, self.sources, strict=True)]
        write = writer(kernel, target, self.result)
        function, dtype = self.function, TYPES[self.result]

        def step(state: State, mask: Mask) -> None:
            value = function(*(read(state) for read in reads))
            write(state, value.astype(dtype, copy=False), mask)

        return step


def whole_warps(state: State, mask: Mask) -> NDArray[np.int64]:
    """Numbers of the executing warps.

    Raises:
        PtxError: Only some lanes of a warp execute.
    """
    if mask is None:
        return np.arange(state.size // WARP)
    active = mask.reshape(-1, WARP)
    every, some = active.all(axis=1), active.any(axis=1)
    if (every != some).any():
        warp = int(np.flatnonzero(every != some)[0])
        raise PtxError(f"not all lanes of warp {warp} execute this together")
    return np.flatnonzero(every)


def by_warp(state: State, value: Lanes) -> Lanes:
    """A register as [warps, 32]."""
    return np.broadcast_to(value, state.size).reshape(-1, WARP)
