"""Instructions that the lanes of a warp execute together: shfl.sync, ldmatrix and mma.sync.

Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16" (.s8) and "... mma.m16n8k32". With group = lane / 4 and
place = lane % 4: register r of A holds row group + 8 * (r % 2), columns 4 * place + 16 * (r / 2) .. + 3; register r of
B holds column group, rows 4 * place + 16 * r .. + 3; register r of C and D holds row group + 8 * (r / 2), column
2 * place + r % 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tests.plugins.ptx.memory import MANY, Integers
from tests.plugins.ptx.opcodes_memory import address_reader
from tests.plugins.ptx.ptx_parser import Instruction, Kernel, PtxError, parts
from tests.plugins.ptx.state import WARP, Lanes, Mask, State, Step, by_warp, reader, whole_warps, writer

_MMA = re.compile(r"mma\.sync\.aligned\.m16n8k(16|32)\.row\.col\.s32\.([su]8)\.([su]8)\.s32$")
_LDMATRIX = re.compile(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16$")
_SHUFFLE = re.compile(r"shfl\.sync\.(bfly|up|down|idx)\.b32$")
_LANE = np.arange(WARP)
ROW_BYTES = 16  # of an 8 x 8 matrix of 16-bit elements


def bind(instruction: Instruction, kernel: Kernel) -> Step | None:
    """The step of a warp instruction, or None where the opcode is no such instruction."""
    if match := _MMA.match(instruction.opcode):
        return _multiply(instruction, kernel, int(match[1]), match[2], match[3])
    if match := _LDMATRIX.match(instruction.opcode):
        return _load_matrices(instruction, kernel, int(match[1]), transposed=match[2] is not None)
    if match := _SHUFFLE.match(instruction.opcode):
        return _shuffle(instruction, kernel, match[1])
    return None


def _bytes(fragments: Sequence[Lanes], type_: str) -> NDArray[np.float32]:
    """Registers [warps, 32] each as elements [warps, 32, registers, 4]."""
    words = np.ascontiguousarray(np.stack(fragments, axis=-1))
    return words.view("i1" if type_ == "s8" else "u1").reshape(*words.shape, 4).astype(np.float32)


def a_from_fragments(fragments: Sequence[Lanes], type_: str) -> NDArray[np.float32]:
    """[warps, 16, 16 or 32] of 2 or 4 registers."""
    warps, columns = fragments[0].shape[0], len(fragments) // 2
    elements = _bytes(fragments, type_).reshape(warps, 8, 4, columns, 2, 4)  # group place column-half row-half byte
    return elements.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, 16 * columns)


def b_from_fragments(fragments: Sequence[Lanes], type_: str) -> NDArray[np.float32]:
    """[warps, 16 or 32, 8] of 1 or 2 registers."""
    warps, halves = fragments[0].shape[0], len(fragments)
    elements = _bytes(fragments, type_).reshape(warps, 8, 4, halves, 4)  # group place half byte
    return elements.transpose(0, 3, 2, 4, 1).reshape(warps, 16 * halves, 8)


def fragments_from_d(d: NDArray[np.int64]) -> list[Lanes]:
    """Four registers [warps, 32] of the sums [warps, 16, 8]."""
    elements = d.reshape(d.shape[0], 2, 8, 4, 2)  # row-half group place column
    return [elements[:, r // 2, :, :, r % 2].reshape(d.shape[0], WARP) for r in range(4)]


def _multiply(instruction: Instruction, kernel: Kernel, k: int, a_type: str, b_type: str) -> Step:
    d, a, b, c = (parts(operand) for operand in instruction.operands)
    if (len(d), len(a), len(b), len(c)) != (4, k // 8, k // 16, 4):
        raise PtxError("wrong number of registers")
    writes = [writer(kernel, text, "s32") for text in d]
    reads_a, reads_b = ([reader(kernel, text, "b32") for text in texts] for texts in (a, b))
    reads_c = [reader(kernel, text, "s32") for text in c]

    def step(state: State, mask: Mask) -> None:
        warps = whole_warps(state, mask)
        left = a_from_fragments([by_warp(state, read(state))[warps] for read in reads_a], a_type)
        right = b_from_fragments([by_warp(state, read(state))[warps] for read in reads_b], b_type)
        # At most 32 products below 2**16: below 2**24, so FP32 is exact.
        products = fragments_from_d(np.matmul(left, right).astype(np.int64))
        for write, product, read in zip(writes, products, reads_c, strict=True):
            value = np.zeros((state.size // WARP, WARP), dtype=np.int32)
            value[warps] = (product + by_warp(state, read(state))[warps]).astype(
                np.int32
            )  # wraps, as without .satfinite
            write(state, value.reshape(-1), mask)

    return step


def _load_matrices(instruction: Instruction, kernel: Kernel, count: int, *, transposed: bool) -> Step:
    targets = parts(instruction.operands[0])
    if len(targets) != count:
        raise PtxError("wrong number of registers")
    writes = [writer(kernel, text, "b32") for text in targets]
    where = address_reader(kernel, instruction.operands[1], "shared")

    def step(state: State, mask: Mask) -> None:
        warps = whole_warps(state, mask)
        rows = where(state).reshape(-1, WARP)[warps, : 8 * count]
        ctas = state.ctas.reshape(-1, WARP)[warps, : 8 * count]
        matrices = _rows(state, rows.reshape(-1), ctas.reshape(-1)).reshape(len(warps), count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(len(warps), count, WARP)
        for i, write in enumerate(writes):
            value = np.zeros((state.size // WARP, WARP), dtype=np.uint32)
            value[warps] = words[:, i]
            write(state, value.reshape(-1), mask)

    return step


def _rows(state: State, addresses: Integers, ctas: Integers) -> NDArray[np.uint16]:
    """Rows of 8 elements of 16 bits; the whole warp counts as their reader."""
    shared = state.shared
    offsets = shared.offsets(ctas, addresses, ROW_BYTES)
    shared.note_read(np.full(len(addresses), MANY), ctas, offsets, ROW_BYTES)
    elements: NDArray[np.uint16] = shared.views[2][(offsets // 2)[:, None] + np.arange(8)]
    return elements


def _sources(mode: str, b: Integers, limit: Integers) -> Integers:
    """Lane that each lane asks; out of range (beyond `limit`) it keeps its own value."""
    asked: dict[str, Callable[[], Integers]] = {
        "bfly": lambda: _LANE ^ b,
        "up": lambda: _LANE - b,
        "down": lambda: _LANE + b,
    }
    source = asked[mode]()
    inside = source >= limit if mode == "up" else source <= limit
    return np.where(inside, source, _LANE)


def _shuffle(instruction: Instruction, kernel: Kernel, mode: str) -> Step:
    target, a, b, c, members = instruction.operands
    register, _, predicate = target.partition("|")
    write = writer(kernel, register, "b32")
    write_inside = writer(kernel, predicate or "_", "pred")
    reads = [reader(kernel, text, "b32") for text in (a, b, c, members)]

    def step(state: State, mask: Mask) -> None:
        warps = whole_warps(state, mask)
        value, lane_operand, clamp, member = (by_warp(state, read(state))[warps].astype(np.int64) for read in reads)
        if (member != 0xFFFFFFFF).any():
            raise PtxError("shfl.sync of a part of a warp is not supported")
        segment = clamp >> 8 & 31
        limit = (_LANE & segment) | (clamp & 31 & ~segment)
        operand = lane_operand & 31
        if mode == "idx":
            asked = (_LANE & segment) | (operand & ~segment)
            source, inside = np.where(asked <= limit, asked, _LANE), asked <= limit
        else:
            source = _sources(mode, operand, limit)
            inside = (source != _LANE) | (operand == 0)
        moved = np.take_along_axis(value, source, axis=1)
        whole, flags = np.zeros((state.size // WARP, WARP), np.uint32), np.zeros((state.size // WARP, WARP), np.bool_)
        whole[warps], flags[warps] = moved.astype(np.uint32), inside
        write(state, whole.reshape(-1), mask)
        write_inside(state, flags.reshape(-1), mask)

    return step
