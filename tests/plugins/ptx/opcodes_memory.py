"""Loads, stores and cp.async: address, width and vector length from the opcode; what it does not know it refuses."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from tests.plugins.ptx.memory import Copies
from tests.plugins.ptx.ptx_parser import Instruction, Kernel, PtxError, address, parts
from tests.plugins.ptx.state import TYPES, Lanes, Mask, Read, State, Step, reader, unsigned, writer

HINTS = r"(?:\.L1::no_allocate|\.L1::evict_\w+|\.L2::(?:64|128|256)B)*"  # of the caches: no effect on values
_ACCESS = re.compile(rf"(ld|st)\.(param|global|shared)(?:\.nc)?{HINTS}(?:\.v([24]))?\.([busf]\d+)$")
_COPY = re.compile(rf"cp\.async\.(ca|cg)\.shared\.global{HINTS}$")
COPY_BYTES = {"ca": (4, 8, 16), "cg": (16,)}


def bind(instruction: Instruction, kernel: Kernel) -> Step | None:
    """The step of a memory instruction, or None where the opcode is no such instruction."""
    opcode = instruction.opcode
    if match := _ACCESS.match(opcode):
        kind, space, count, type_ = match.groups()
        size = int(type_[1:]) // 8
        if kind == "ld" and space == "param":
            return _load_parameter(instruction, kernel, type_)
        if space == "param":
            return None
        make = _load if kind == "ld" else _store
        vector = parts(instruction.operands[0 if kind == "ld" else 1])
        if len(vector) != int(count or 1) or size * len(vector) > 16:
            raise PtxError(f"{len(vector)} registers for {opcode}")
        return make(instruction, kernel, space, type_)
    if match := _COPY.match(opcode):
        return _copy(instruction, kernel, match[1])
    if opcode == "cp.async.commit_group":
        return _commit
    if opcode in ("cp.async.wait_group", "cp.async.wait_all"):
        return _wait(int(instruction.operands[0])) if instruction.operands else _wait_all
    return None


def address_reader(kernel: Kernel, operand: str, space: str) -> Read:
    """Reads `[base+offset]` as INT64; shared addresses have 32 bits, global ones 64."""
    base, offset = address(operand)
    read = reader(kernel, base, "u32" if space == "shared" else "u64")
    return lambda state: np.broadcast_to(read(state), state.size).astype(np.int64) + offset


def _spread(state: State, mask: Mask, selected: NDArray[np.int64], values: Lanes) -> Lanes:
    """Values of the selected lanes as an array of all lanes."""
    if mask is None:
        return values
    whole = np.zeros(state.size, dtype=values.dtype)
    whole[selected] = values
    return whole


def _load_parameter(instruction: Instruction, kernel: Kernel, type_: str) -> Step:
    name, offset = address(instruction.operands[1])
    if name != kernel.param_name:
        raise PtxError(f"{name} is no parameter")
    targets = parts(instruction.operands[0])
    writes = [writer(kernel, target, type_) for target in targets]
    dtype = TYPES[type_]
    if offset + dtype.itemsize * len(targets) > kernel.param_bytes:
        raise PtxError(f"byte {offset} is past the parameters")

    def step(state: State, mask: Mask) -> None:
        values = np.frombuffer(state.launch.parameters, dtype=dtype, count=len(writes), offset=offset)
        for i, write in enumerate(writes):
            write(state, values[i : i + 1], mask)

    return step


def _load(instruction: Instruction, kernel: Kernel, space: str, type_: str) -> Step:
    writes = [writer(kernel, target, type_) for target in parts(instruction.operands[0])]
    where = address_reader(kernel, instruction.operands[1], space)
    dtype = TYPES[type_]

    def step(state: State, mask: Mask) -> None:
        selected = state.selected(mask)
        addresses = where(state)[selected]
        if space == "global":
            loaded = state.launch.memory.load(addresses, dtype.itemsize, len(writes))
        else:
            loaded = state.shared.load(selected, state.ctas[selected], addresses, dtype.itemsize, len(writes))
        for i, write in enumerate(writes):
            value = np.ascontiguousarray(loaded[:, i]).view(dtype)
            write(state, _spread(state, mask, selected, value), mask)

    return step


def _store(instruction: Instruction, kernel: Kernel, space: str, type_: str) -> Step:
    where = address_reader(kernel, instruction.operands[0], space)
    reads = [reader(kernel, text, type_) for text in parts(instruction.operands[1])]
    raw = unsigned(TYPES[type_].itemsize) if TYPES[type_].itemsize > 1 else np.dtype(np.uint8)

    def step(state: State, mask: Mask) -> None:
        selected = state.selected(mask)
        addresses = where(state)[selected]
        columns = [np.broadcast_to(read(state).view(raw), state.size)[selected] for read in reads]
        values = np.stack(columns, axis=1)
        if space == "global":
            state.launch.memory.store(addresses, values)
        else:
            state.shared.store(selected, state.ctas[selected], addresses, values)

    return step


def _copy(instruction: Instruction, kernel: Kernel, level: str) -> Step:
    target, source, size_text, *rest = instruction.operands
    size = int(size_text, 0)
    if size not in COPY_BYTES[level] or len(rest) > 1:
        raise PtxError(f"cp.async.{level} of {size} bytes with {len(rest)} more operands")
    target_address = address_reader(kernel, target, "shared")
    source_address = address_reader(kernel, source, "global")
    source_bytes = reader(kernel, rest[0] if rest else size_text, "u32")

    def step(state: State, mask: Mask) -> None:
        selected = state.selected(mask)
        wanted = np.broadcast_to(source_bytes(state), state.size)[selected].astype(np.int64)
        if ((wanted != 0) & (wanted != size)).any():
            raise PtxError(f"cp.async of a part of {size} bytes is not supported")
        data = np.zeros((len(selected), size // 4), dtype=np.uint32)
        reads = wanted == size
        sources = source_address(state)[selected]
        if reads.any():
            state.launch.memory.check(sources[reads], size, write=False)
            data[reads] = state.launch.memory.load(sources[reads], 4, size // 4)
        copies = Copies(selected, state.ctas[selected], target_address(state)[selected], data, _groups(state)[selected])
        state.shared.start_copies(copies)

    return step


def _groups(state: State) -> NDArray[np.int64]:
    """How many groups each lane has committed."""
    if not len(state.shared.committed):
        state.shared.committed = np.zeros(state.size, dtype=np.int64)
    return state.shared.committed


def _commit(state: State, mask: Mask) -> None:
    groups = _groups(state)
    groups += 1 if mask is None else mask


def _wait(open_groups: int) -> Step:
    def step(state: State, mask: Mask) -> None:
        _groups(state)
        state.shared.finish_copies(state.selected(mask), open_groups)

    return step


def _wait_all(state: State, mask: Mask) -> None:
    """As a commit and a wait for every group."""
    _commit(state, mask)
    state.shared.finish_copies(state.selected(mask), 0)
