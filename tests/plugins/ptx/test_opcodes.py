"""Instructions of the interpreter against answers worked out by hand from the PTX ISA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.plugins.ptx.snippet import floats, run, signed, unsigned

INF, NAN = float("inf"), float("nan")
SMALLEST_HALF = 2.0**-24
INTEGER_CASES: tuple[tuple[str, tuple[int, ...], int], ...] = (
    ("add.s32 %o0, %i0, %i1;", (0x7FFFFFFF, 1), 0x80000000),  # wraps
    ("sub.s32 %o0, %i0, %i1;", (0, 1), 0xFFFFFFFF),
    ("mul.lo.s32 %o0, %i0, %i1;", (0x10000, 0x10001), 0x00010000),
    ("mul.hi.s32 %o0, %i0, %i1;", (-1, 2), 0xFFFFFFFF),
    ("mul.hi.u32 %o0, %i0, %i1;", (-1, 2), 1),
    ("mad.lo.s32 %o0, %i0, %i1, %i2;", (-3, 5, 7), 0xFFFFFFF8),
    ("div.s32 %o0, %i0, %i1;", (-7, 2), 0xFFFFFFFD),  # towards zero
    ("div.u32 %o0, %i0, %i1;", (-7, 2), 0x7FFFFFFC),
    ("rem.s32 %o0, %i0, %i1;", (-7, 2), 0xFFFFFFFF),
    ("min.s32 %o0, %i0, %i1;", (-1, 1), 0xFFFFFFFF),
    ("min.u32 %o0, %i0, %i1;", (-1, 1), 1),
    ("abs.s32 %o0, %i0;", (-5,), 5),
    ("shl.b32 %o0, %i0, %i1;", (3, 31), 0x80000000),
    ("shl.b32 %o0, %i0, %i1;", (3, 32), 0),
    ("shr.u32 %o0, %i0, %i1;", (-1, 33), 0),
    ("shr.s32 %o0, %i0, %i1;", (-4, 33), 0xFFFFFFFF),
    ("and.b32 %o0, %i0, -16;", (0x123F,), 0x1230),
    ("not.b32 %o0, %i0;", (0xFF,), 0xFFFFFF00),
    ("bfe.u32 %o0, %i0, 8, 4;", (0xABCD,), 0xB),
    ("bfe.s32 %o0, %i0, 8, 4;", (0xABCD,), 0xFFFFFFFB),
    ("bfe.s32 %o0, %i0, 28, 8;", (0x90000000,), 0xFFFFFFF9),  # past the end: the sign goes on
    ("bfe.u32 %o0, %i0, 0, 0;", (-1,), 0),
    ("bfi.b32 %o0, %i0, %i1, 8, 4;", (0xFB, 0xFFFFFFFF), 0xFFFFFBFF),
    ("prmt.b32 %o0, %i0, %i1, 0x7531;", (0x33221100, 0x77665544), 0x77553311),
    ("prmt.b32 %o0, %i0, 0, 4369;", (0x00008500,), 0x85858585),
    ("prmt.b32 %o0, %i0, 0, 0x99DD;", (0x00008500,), 0xFFFF0000),  # top bit of a nibble: the sign
    ("dp4a.s32.s32 %o0, %i0, %i1, %i2;", (0x80FF7F01, 0x80FF7F01, 10), 128 * 128 + 1 + 127 * 127 + 1 + 10),
    ("dp4a.s32.u32 %o0, %i0, %i1, %i2;", (0x80FF7F01, 0x80FF7F01, 0), (-128 * 128 - 255 + 127 * 127 + 1) % 2**32),
    ("mov.b32 {%h0, %h1}, %i0; mov.b32 %o0, {%h1, %h0};", (0x12345678,), 0x56781234),
    ("cvt.u16.u32 %h0, %i0; cvt.u32.u16 %o0, %h0;", (0x12345678,), 0x5678),
    ("cvt.u16.u32 %h0, %i0; cvt.s32.s16 %o0, %h0;", (0xFFFF,), 0xFFFFFFFF),
    ("cvt.s32.s8 %o0, %i0;", (0x1280,), 0xFFFFFF80),
    ("cvt.sat.s8.s32 %r0, %i0; mov.u32 %o0, %r0;", (300,), 127),
    ("cvt.sat.u8.s32 %r0, %i0; mov.u32 %o0, %r0;", (-300,), 0),
    ("mul.wide.s32 %rd0, %i0, %i1; shr.u64 %rd0, %rd0, 32; cvt.u32.u64 %o0, %rd0;", (-2, 3), 0xFFFFFFFF),
    ("setp.lt.s32 %p0, %i0, %i1; selp.b32 %o0, 1, 2, %p0;", (-1, 1), 1),
    ("setp.lt.u32 %p0, %i0, %i1; selp.b32 %o0, 1, 2, %p0;", (-1, 1), 2),
    ("{ .reg .b16 tmp; mov.b32 {tmp, %h0}, %i0; } cvt.u32.u16 %o0, %h0;", (0x12345678,), 0x1234),
)
FLOAT_CASES: tuple[tuple[str, tuple[float, ...], float], ...] = (
    ("cvt.rni.f32.f32 {d}, {a};", (2.5,), 2.0),  # ties to even
    ("cvt.rni.f32.f32 {d}, {a};", (-3.5,), -4.0),
    ("cvt.rzi.f32.f32 {d}, {a};", (-3.5,), -3.0),
    ("min.f32 {d}, {a}, {b};", (NAN, 1.0), 1.0),
    ("max.f32 {d}, {a}, {b};", (-0.0, 0.0), 0.0),
    ("abs.f32 {d}, {a};", (-2.0,), 2.0),
    ("div.rn.f32 {d}, {a}, {b};", (1.0, 3.0), float(np.float32(1) / np.float32(3))),
    ("mul.f32 {d}, {a}, {b};", (2.0**-100, 2.0**-40), 2.0**-140),  # subnormal: kept
    ("fma.rn.f32 {d}, {a}, {a}, {b};", (1 + 2.0**-12, -1.0), 2.0**-11 + 2.0**-24),  # the product is not rounded
    # Below a tie by 2**-70: FP64 alone would round to the tie, and then to even.
    ("fma.rn.f32 {d}, {a}, {b}, {c};", (2.0**-24 + 2.0**-47, 1 - 2.0**-23, 1 + 2.0**-23), 1 + 2.0**-23),
)


@pytest.mark.parametrize(("body", "inputs", "answer"), INTEGER_CASES)
def test_integers(body: str, inputs: tuple[int, ...], answer: int) -> None:
    """One instruction, or a few, on integers."""
    (got,) = run(body, *(unsigned(value) for value in inputs))
    assert [hex(value) for value in np.unique(got)] == [hex(answer)]


@pytest.mark.parametrize(("body", "inputs", "answer"), FLOAT_CASES)
def test_floats(body: str, inputs: tuple[float, ...], answer: float) -> None:
    """One instruction on FP32 values, bit for bit."""
    moves = "".join(f"mov.b32 %f{i}, %i{i};" for i in range(len(inputs)))
    names = dict(zip("abcd", ("%f0", "%f1", "%f2", "%f9"), strict=True))
    (got,) = run(moves + body.format(**names) + "mov.b32 %o0, %f9;", *(floats(value) for value in inputs))
    assert hex(got[0]) == hex(np.array(answer, dtype=np.float32).view(np.uint32)[()])


@pytest.mark.parametrize(
    ("target", "source", "answer"),
    [
        ("rzi.s32", 2.9, 2),
        ("rzi.s32", -2.9, -2),
        ("rni.s32", 2.5, 2),
        ("rzi.s32", 3e9, 2**31 - 1),  # saturates
        ("rzi.s32", -INF, -(2**31)),
        ("rzi.s32", NAN, 0),
        ("rzi.u32", -1.0, 0),
    ],
)
def test_integer_from_float(target: str, source: float, answer: int) -> None:
    """Rounding as named, saturation, and 0 for NaN."""
    (got,) = run(f"mov.b32 %f0, %i0; cvt.{target}.f32 %o0, %f0;", floats(source))
    assert got[0] == answer % 2**32


@pytest.mark.parametrize(
    ("type_", "source", "answer"),
    [
        ("f16", 1 + 2.0**-11, 0x3C00),  # tie to even
        ("f16", 1 + 3 * 2.0**-11, 0x3C02),
        ("f16", 65519.0, 0x7BFF),
        ("f16", 65520.0, 0x7C00),
        ("f16", SMALLEST_HALF / 2, 0x0000),
        ("f16", SMALLEST_HALF * 1.5, 0x0002),
        ("f16", NAN, 0x7FFF),
        ("bf16", 1 + 2.0**-8, 0x3F80),
        ("bf16", 1 + 3 * 2.0**-8, 0x3F82),
        ("bf16", -INF, 0xFF80),
        ("bf16", NAN, 0x7FFF),
    ],
)
def test_half_from_float(type_: str, source: float, answer: int) -> None:
    """One rounding to nearest even, overflow to infinity, subnormals, and the NaN of the PTX ISA."""
    (got,) = run(f"mov.b32 %f0, %i0; cvt.rn.{type_}.f32 %h0, %f0; cvt.u32.u16 %o0, %h0;", floats(source))
    assert hex(got[0]) == hex(answer)


def test_every_half_becomes_its_float() -> None:
    """cvt.f32.f16 of all numbers is exact."""
    halves = np.arange(65536, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))]
    threads = 512
    for chunk in halves[: len(halves) // threads * threads].reshape(-1, threads)[::31]:
        body = "cvt.u16.u32 %h0, %i0; cvt.f32.f16 %f0, %h0; mov.b32 %o0, %f0;"
        (got,) = run(body, chunk.astype(np.uint32), threads=threads)
        np.testing.assert_array_equal(got, chunk.view(np.float16).astype(np.float32).view(np.uint32))


def test_fused_multiply_add_rounds_once() -> None:
    """Random exponents, against exact rational arithmetic."""
    from fractions import Fraction

    rng = np.random.default_rng(1)
    scale = np.exp2(rng.integers(-30, 30, (3, 512)))
    a, b, c = (rng.uniform(-2, 2, (3, 512)) * scale).astype(np.float32)
    body = "mov.b32 %f0, %i0; mov.b32 %f1, %i1; mov.b32 %f2, %i2; fma.rn.f32 %f3, %f0, %f1, %f2; mov.b32 %o0, %f3;"
    (got,) = run(body, a, b, c, threads=512)
    for result, x, y, z in zip(got.view(np.float32), a, b, c, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        below, above = (np.nextafter(result, np.float32(side)) for side in (-INF, INF))
        distance = abs(Fraction(float(result)) - exact)
        assert distance <= min(abs(Fraction(float(below)) - exact), abs(Fraction(float(above)) - exact))


@pytest.mark.parametrize("table", range(0, 256, 5))
def test_lop3(table: int) -> None:
    """With F0, CC and AA as sources the result is the truth table itself."""
    (got,) = run(f"lop3.b32 %o0, %i0, %i1, %i2, {table};", unsigned(0xF0), unsigned(0xCC), unsigned(0xAA))
    assert got[0] & 0xFF == table


@pytest.mark.parametrize(
    ("compare", "answers"), [("lt", (1, 0, 0)), ("ne", (1, 0, 0)), ("neu", (1, 0, 1)), ("equ", (0, 1, 1))]
)
def test_float_comparisons(compare: str, answers: tuple[int, ...]) -> None:
    """NaN makes every comparison false, and those that end in u true."""
    body = f"mov.b32 %f0, %i0; mov.b32 %f1, %i1; setp.{compare}.f32 %p0, %f0, %f1; selp.b32 %o0, 1, 0, %p0;"
    (got,) = run(body, floats(1, 2, NAN), floats(2, 2, 2))
    assert tuple(got[:3]) == answers


def test_a_guard_leaves_other_lanes_alone() -> None:
    """`@p` and `@!p` write the lanes where the predicate is true, or false."""
    body = "setp.lt.s32 %p0, %i0, 2; mov.u32 %o0, 7; @%p0 mov.u32 %o0, 8; @!%p0 add.s32 %o0, %o0, 1;"
    (got,) = run(body, signed(0, 1, 2, 3))
    assert got[:4].tolist() == [8, 8, 8, 8]
    body = body.replace("add.s32 %o0, %o0, 1", "add.s32 %o0, %o0, 2")
    assert run(body, signed(0, 1, 2, 3))[0][:4].tolist() == [8, 8, 9, 9]


def test_a_loop_of_unequal_length() -> None:
    """Lanes leave a loop one by one and meet behind it: lane l adds 0 + 1 + ... + l."""
    body = """mov.u32 %r0, 0; mov.u32 %o0, 0;
    TOP: setp.gt.s32 %p0, %r0, %tid; @%p0 bra DONE;
    add.s32 %o0, %o0, %r0; add.s32 %r0, %r0, 1; bra.uni TOP;
    DONE: shfl.sync.bfly.b32 %o0|%p1, %o0, 0, 31, -1;"""
    lanes = np.arange(32)
    np.testing.assert_array_equal(run(body)[0], lanes * (lanes + 1) // 2)


LANE = np.arange(32)


@pytest.mark.parametrize(
    ("mode", "operand", "clamp", "source", "inside"),
    [
        ("bfly", 5, 31, LANE ^ 5, LANE >= 0),
        ("down", 3, 31, np.where(LANE + 3 < 32, LANE + 3, LANE), LANE + 3 < 32),
        ("up", 3, 0, np.where(LANE >= 3, LANE - 3, LANE), LANE >= 3),
        ("idx", 9, 31, np.full(32, 9), LANE >= 0),
        # Segments of 8: the mask of the upper bits in bits 8 to 12.
        ("down", 3, 0x1807, np.where(LANE % 8 + 3 < 8, LANE + 3, LANE), LANE % 8 + 3 < 8),
        ("idx", 2, 0x1807, LANE // 8 * 8 + 2, LANE >= 0),
    ],
)
def test_shuffle(mode: str, operand: int, clamp: int, source: Any, inside: Any) -> None:
    """Each lane gets the value of its source, or its own, and the predicate tells which."""
    body = f"shfl.sync.{mode}.b32 %o0|%p0, %i0, {operand}, {clamp}, -1; selp.b32 %o1, 1, 0, %p0;"
    value, flag = run(body, unsigned(*range(100, 132)), outputs=2)
    np.testing.assert_array_equal(value, 100 + source)
    np.testing.assert_array_equal(flag, inside)
