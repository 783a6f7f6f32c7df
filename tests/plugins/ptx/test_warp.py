"""Matrix instructions, memory and control of the interpreter: the answers by hand, and each rule that it enforces."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.plugins.ptx.memory import ASYNC_POISON
from tests.plugins.ptx.ptx_parser import PtxError
from tests.plugins.ptx.snippet import run

SMEM = "mov.u32 %r0, smem; shl.b32 %r1, %tid, 2; add.s32 %r1, %r0, %r1;"
COPY = SMEM + "shl.b32 %r2, %tid, 4; add.s32 %r2, %r0, %r2; mul.wide.u32 %rd0, %tid, 12; add.s64 %rd1, %in, %rd0;"


def word(values: NDArray[np.integer]) -> int:
    """Four bytes, the first one lowest."""
    return int(np.ascontiguousarray(values).astype(np.uint8).view(np.uint32)[0])


@pytest.mark.parametrize(("k", "b_type"), [(32, "s8"), (32, "u8"), (16, "s8")])
def test_mma(k: int, b_type: str) -> None:
    """D = A B + C in the fragment layouts of the PTX ISA, written down here lane by lane."""
    rng = np.random.default_rng(k)
    a, c = rng.integers(-128, 128, (16, k)), rng.integers(-1000, 1000, (16, 8))
    b = rng.integers(-128, 128, (k, 8)) if b_type == "s8" else rng.integers(0, 256, (k, 8))
    registers_a, registers_b = k // 8, k // 16
    inputs = np.zeros((registers_a + registers_b + 4, 32), dtype=np.uint32)
    for lane in range(32):
        group, place = lane // 4, lane % 4
        for r in range(registers_a):
            row, column = group + 8 * (r % 2), 16 * (r // 2) + 4 * place
            inputs[r, lane] = word(a[row, column : column + 4])
        for r in range(registers_b):
            row = 16 * r + 4 * place
            inputs[registers_a + r, lane] = word(b[row : row + 4, group])
        for r in range(4):
            value = c[group + 8 * (r // 2), 2 * place + r % 2]
            inputs[registers_a + registers_b + r, lane] = value % 2**32
    names = [f"%i{i}" for i in range(len(inputs))]
    fragments = (
        names[:registers_a],
        names[registers_a : registers_a + registers_b],
        names[registers_a + registers_b :],
    )
    operands = ", ".join("{" + ", ".join(fragment) + "}" for fragment in fragments)
    opcode = f"mma.sync.aligned.m16n8k{k}.row.col.s32.s8.{b_type}.s32"
    d = run(f"{opcode} {{%o0, %o1, %o2, %o3}}, {operands};", *inputs, outputs=4)
    want = a @ b + c
    for lane in range(32):
        rows = [want[lane // 4 + 8 * (r // 2), 2 * (lane % 4) + r % 2] for r in range(4)]
        assert [int(register.view(np.int32)[lane]) for register in d] == rows


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed: bool) -> None:
    """Lane l gets elements 2 * (l % 4) and + 1 of row l / 4, or of column l / 4."""
    form = ".trans" if transposed else ""
    body = f"""{SMEM} st.shared.u32 [%r1], %i0; st.shared.u32 [%r1+128], %i1;
    st.shared.u32 [%r1+256], %i2; st.shared.u32 [%r1+384], %i3; bar.sync 0;
    shl.b32 %r3, %tid, 4; add.s32 %r3, %r0, %r3;
    ldmatrix.sync.aligned.m8n8.x4{form}.shared.b16 {{%o0, %o1, %o2, %o3}}, [%r3];"""
    elements = np.arange(256, dtype=np.uint16) * 7 + 1
    got = run(body, *elements.view(np.uint32).reshape(4, 32), outputs=4, shared_bytes=512)
    for number, matrix in enumerate(elements.reshape(4, 8, 8)):
        seen = matrix.T if transposed else matrix
        for lane in range(32):
            pair = seen[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert got[number][lane] == int(pair[0]) | int(pair[1]) << 16


def test_shared_memory_across_a_barrier() -> None:
    """What one warp stores the other one reads after the barrier."""
    body = f"{SMEM} st.shared.u32 [%r1], %i0; bar.sync 0; xor.b32 %r2, %r1, 128; ld.shared.u32 %o0, [%r2];"
    values = np.arange(64, dtype=np.uint32) + 5
    (got,) = run(body, values, threads=64, shared_bytes=256)
    np.testing.assert_array_equal(got, np.roll(values, 32))


def test_cp_async_arrives_at_the_wait() -> None:
    """Sixteen bytes of each of 32 threads; zeros where the source size is 0."""
    body = f"""{COPY} and.b32 %r3, %tid, 1; shl.b32 %r3, %r3, 4;
    cp.async.cg.shared.global.L2::128B [%r2], [%rd1], 16, %r3;
    cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
    ld.shared.v4.u32 {{%o0, %o1, %o2, %o3}}, [%r2];"""
    source = np.arange(128, dtype=np.uint32) + 1
    got = np.stack(run(body, *source.reshape(4, 32), outputs=4, shared_bytes=512), axis=1)
    want = source.reshape(32, 4).copy()
    want[::2] = 0
    np.testing.assert_array_equal(got, want)
    assert not (got.view(np.uint8) == ASYNC_POISON).any()


RULES = {
    "is read while a cp.async still writes it": f"""{COPY} cp.async.cg.shared.global [%r2], [%rd1], 16;
        cp.async.commit_group; cp.async.wait_group 1; ld.shared.u32 %o0, [%r2];""",
    "threads end while their cp.async is under way": f"{COPY} cp.async.cg.shared.global [%r2], [%rd1], 16;",
    "was never written": f"{SMEM} ld.shared.u32 %o0, [%r1];",
    "is read after another thread wrote it": f"""{SMEM} st.shared.u32 [%r1], %tid;
        xor.b32 %r2, %r1, 4; ld.shared.u32 %o0, [%r2];""",
    "is written after another thread read it": f"""{SMEM} st.shared.u32 [%r1], %tid; bar.sync 0;
        ld.shared.u32 %o0, [%r1]; xor.b32 %r2, %r1, 4; st.shared.u32 [%r2], %tid;""",
    "is written by two threads": f"{SMEM} st.shared.u32 [%r0], %tid;",
    "out of bounds of shared memory": f"{SMEM} st.shared.u32 [%r1+2048], %tid;",
    "out of bounds of global memory": "ld.global.u32 %o0, [%in+8192];",
    "is not a multiple of 8": "ld.global.v2.u32 {%o0, %r0}, [%in];",
    "writes to input": "st.global.u32 [%in], %tid;",
    "wait at a barrier": "setp.lt.s32 %p0, %tid, 32; @%p0 bra OUT; bar.sync 0; OUT: mov.u32 %o0, 1;",
    "not all lanes of warp 0": """setp.lt.s32 %p0, %tid, 7; @%p0 bra OUT;
        shfl.sync.bfly.b32 %o0|%p1, %tid, 1, 31, -1; OUT: mov.u32 %o0, 1;""",
    "of a part of a warp": "shfl.sync.bfly.b32 %o0|%p1, %tid, 1, 31, 0xFFFF;",
    "it does not end": "TOP: add.s32 %o0, %o0, 1; bra.uni TOP;",
    "is no register": "mov.u32 7, %tid;",
    "has 16 bits": "add.s32 %o0, %h0, 1;",
    "unknown operand": "mov.u32 %o0, nowhere;",
    "unknown opcode rcp.approx.f32": "rcp.approx.f32 %f0, %f1;",
    "unsupported declaration": ".local .align 4 .b8 depot[16];",
}


@pytest.mark.parametrize("message", RULES)
def test_a_broken_rule_is_named(message: str) -> None:
    """The interpreter stops and says which rule the text broke."""
    with pytest.raises(PtxError, match=message):
        run(RULES[message], *np.zeros((4, 64), dtype=np.uint32), threads=64, shared_bytes=1024)
