"""Floating-point instructions in FP32, and conversions: each rounds once, as IEEE 754 and the PTX ISA say.

Without `.ftz` subnormal numbers are kept. The approximate instructions (`rcp.approx`, `div.full`, `ex2`, ...) have no
exact answer and are not here: a kernel that comes to use one is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.plugins.ptx.opcodes_integer import COMPARISONS, LOGIC
from tests.plugins.ptx.state import TYPES, Arithmetic, Lanes

FLOAT32_NAN = np.uint32(0x7FFFFFFF)
"""What an FP32 instruction gives for NaN."""
HALF_NAN = np.uint16(0x7FFF)
"""As FLOAT32_NAN, for FP16 and BF16."""

Floats = NDArray[np.float32]


def _canonical(value: Floats) -> Floats:
    bits = value.view(np.uint32)
    return np.where(np.isnan(value), FLOAT32_NAN, bits).view(np.float32)


def fused_multiply_add(a: Floats, b: Floats, c: Floats) -> Floats:
    """A * b + c, rounded once to FP32.

    The product is exact in FP64. Its sum with c is rounded to odd: where FP64 is inexact (Knuth's two-sum gives the
    rest), the last bit becomes 1. Rounding such a value again, to 24 of its 53 bits, is as rounding the exact sum
    (Boldo and Melquiond, Emulation of a FMA and correctly rounded sums, 2008, theorem 1).
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    part = total - product
    rest = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & np.isfinite(rest) & (rest != 0) & (bits & 1 == 0)
    step = np.where((rest > 0) == (total > 0), 1, -1)
    odd = np.where(inexact, bits + step, bits).view(np.float64)
    return _canonical(odd.astype(np.float32))


def _rounded(function: Callable[..., Any]) -> Callable[..., Lanes]:
    """One FP32 operation of numpy, which rounds to nearest even, with PTX's NaN."""
    return lambda *sources: _canonical(function(*sources))


def _smallest(a: Floats, b: Floats) -> Floats:
    """min: the other operand where one is NaN; -0 is below +0."""
    less = np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b))
    return _canonical(less.astype(np.float32))


def _largest(a: Floats, b: Floats) -> Floats:
    more = np.where(a == b, np.where(np.signbit(a), b, a), np.fmax(a, b))
    return _canonical(more.astype(np.float32))


def _to_integer(target: str, rounding: Callable[..., Any]) -> Callable[..., Lanes]:
    """Rounds, then saturates; NaN becomes 0."""
    limits = np.iinfo(TYPES[target])

    def convert(a: Floats) -> Lanes:
        whole = rounding(a.astype(np.float64))
        inside = np.clip(np.where(np.isnan(whole), 0.0, whole), float(limits.min), float(limits.max))
        return inside.astype(TYPES[target])

    return convert


def half_bits(a: Floats) -> NDArray[np.uint16]:
    """cvt.rn.f16.f32."""
    return np.where(np.isnan(a), HALF_NAN, a.astype(np.float16).view(np.uint16))


def bfloat16_bits(a: Floats) -> NDArray[np.uint16]:
    """cvt.rn.bf16.f32."""
    return np.where(np.isnan(a), HALF_NAN, a.astype(ml_dtypes.bfloat16).view(np.uint16))


def _packed(convert: Callable[[Floats], NDArray[np.uint16]]) -> Callable[[Floats, Floats], Lanes]:
    """The first source in the high half."""
    return lambda high, low: (convert(high).astype(np.uint32) << np.uint32(16)) | convert(low)


def _widened(a: NDArray[np.uint16]) -> Lanes:
    return a.astype(np.uint32) << np.uint32(16)


def _ordered(name: str) -> Callable[[Any, Any], Any]:
    """Comparisons are false for NaN, also `ne`; the forms that end in u are true."""
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if name == "equ":
        return lambda a, b: ~((a < b) | (a > b))
    if name.endswith("u"):
        return lambda a, b: COMPARISONS[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    return COMPARISONS[name]


def _comparisons() -> dict[str, Arithmetic]:
    table = {}
    for name in (*COMPARISONS, *(f"{name}u" for name in COMPARISONS)):
        compare = _ordered(name)
        table[f"setp.{name}.f32"] = Arithmetic(compare, "pred", ("f32", "f32"))
        for word, join in LOGIC.items():
            table[f"setp.{name}.{word}.f32"] = Arithmetic(
                lambda a, b, c, compare=compare, join=join: join(compare(a, b), c), "pred", ("f32", "f32", "pred")
            )
    return table


def _conversions() -> dict[str, Arithmetic]:
    table = {
        "cvt.f32.f16": Arithmetic(lambda a: _canonical(a.astype(np.float32)), "f32", ("f16",)),
        "cvt.rn.f16.f32": Arithmetic(half_bits, "b16", ("f32",)),
        "cvt.rn.bf16.f32": Arithmetic(bfloat16_bits, "b16", ("f32",)),
        "cvt.rn.f16x2.f32": Arithmetic(_packed(half_bits), "b32", ("f32", "f32")),
        "cvt.rn.bf16x2.f32": Arithmetic(_packed(bfloat16_bits), "b32", ("f32", "f32")),
        "cvt.f32.bf16": Arithmetic(_widened, "b32", ("b16",)),
    }
    modes: dict[str, Callable[..., Any]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    for mode, rounding in modes.items():
        table[f"cvt.{mode}.f32.f32"] = Arithmetic(_rounded(rounding), "f32", ("f32",))
        for target in ("s32", "u32"):
            table[f"cvt.{mode}.{target}.f32"] = Arithmetic(_to_integer(target, rounding), target, ("f32",))
    for source in ("s32", "u32", "s16", "u16"):
        table[f"cvt.rn.f32.{source}"] = Arithmetic(lambda a: a.astype(np.float32), "f32", (source,))
    return table


def _arithmetic() -> dict[str, Arithmetic]:
    table = {}
    two: dict[str, Callable[..., Any]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    for name, function in two.items():
        for rounding in ("", ".rn"):
            table[f"{name}{rounding}.f32"] = Arithmetic(_rounded(function), "f32", ("f32", "f32"))
    table["div.rn.f32"] = Arithmetic(_rounded(np.divide), "f32", ("f32", "f32"))
    table["rcp.rn.f32"] = Arithmetic(_rounded(lambda a: np.float32(1) / a), "f32", ("f32",))
    table["fma.rn.f32"] = Arithmetic(fused_multiply_add, "f32", ("f32", "f32", "f32"))
    table["min.f32"] = Arithmetic(_smallest, "f32", ("f32", "f32"))
    table["max.f32"] = Arithmetic(_largest, "f32", ("f32", "f32"))
    # The sign bit only: a NaN keeps its bits.
    table["abs.f32"] = Arithmetic(lambda a: a & np.uint32(0x7FFFFFFF), "b32", ("b32",))
    table["neg.f32"] = Arithmetic(lambda a: a ^ np.uint32(0x80000000), "b32", ("b32",))
    return table


TABLE = _arithmetic() | _conversions() | _comparisons()
"""Whole opcode -> meaning."""
