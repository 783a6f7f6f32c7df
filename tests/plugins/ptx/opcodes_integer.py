"""Integer, logic, comparison and data movement instructions, from the PTX ISA's descriptions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.plugins.ptx.state import TYPES, Arithmetic, Lanes

INTEGERS = ("s16", "u16", "s32", "u32", "s64", "u64")
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
LOGIC: dict[str, Callable[[Any, Any], Any]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _shift_left(a: Lanes, amount: Lanes) -> Any:
    bits = 8 * a.dtype.itemsize
    shifted = a << np.minimum(amount, bits - 1).astype(a.dtype)
    return np.where(amount >= bits, a.dtype.type(0), shifted)


def _shift_right(a: Lanes, amount: Lanes) -> Any:
    """Amounts of the width or more give 0, or the sign."""
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(amount, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(amount >= bits, a.dtype.type(0), shifted)


def _high(a: Lanes, b: Lanes) -> Any:
    wide = np.dtype(f"{a.dtype.kind}8")
    return (a.astype(wide) * b.astype(wide)) >> wide.type(32)


def _divide(a: Lanes, b: Lanes) -> Lanes:
    """Rounds towards zero; division by zero gives all ones, as the hardware does."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * safe != a)).astype(a.dtype)
    return np.where(zero, a.dtype.type(-1) if a.dtype.kind == "i" else ~a.dtype.type(0), quotient)


def _remainder(a: Lanes, b: Lanes) -> Any:
    return a - _divide(a, b) * b


def permute_bytes(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """prmt.b32: nibble i of the selector picks byte i of the result out of b:a; its top bit copies the sign instead."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), dtype=np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        result |= np.where(nibble & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * i)
    return result


def logic3(a: Lanes, b: Lanes, c: Lanes, table: Lanes) -> Lanes:
    """lop3.b32: bit (a << 2 | b << 1 | c) of the table."""
    shape = np.broadcast_shapes(a.shape, b.shape, c.shape)
    result = np.zeros(shape, dtype=np.uint32)
    for i in range(8):
        term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        result |= np.where(table >> np.uint32(i) & np.uint32(1), term, np.uint32(0))
    return result


def extract_bits(a: Lanes, position: Lanes, length: Lanes) -> Lanes:
    """bfe: `length` bits from `position` on; signed: then the field's top bit, or that of `a` past its end."""
    bits = 8 * a.dtype.itemsize
    start = (position & np.uint32(0xFF)).astype(np.int64)
    size = (length & np.uint32(0xFF)).astype(np.int64)
    raw = a.view(f"u{a.dtype.itemsize}")
    shape = np.broadcast_shapes(a.shape, start.shape, size.shape)
    sign_at = np.minimum(start + size - 1, bits - 1)
    sign = (raw >> np.maximum(sign_at, 0).astype(raw.dtype)) & raw.dtype.type(1)
    sign = np.where((size == 0) | (a.dtype.kind == "u"), raw.dtype.type(0), sign)
    result = np.zeros(shape, dtype=raw.dtype)
    for i in range(bits):
        inside = (i < size) & (start + i < bits)
        bit = (raw >> np.minimum(start + i, bits - 1).astype(raw.dtype)) & raw.dtype.type(1)
        result |= np.where(inside, bit, sign).astype(raw.dtype) << raw.dtype.type(i)
    return result.view(a.dtype)


def insert_bits(a: Lanes, b: Lanes, position: Lanes, length: Lanes) -> Lanes:
    """bfi: the low `length` bits of a at `position` of b."""
    bits = 8 * a.dtype.itemsize
    start = (position & np.uint32(0xFF)).astype(np.int64)
    size = (length & np.uint32(0xFF)).astype(np.int64)
    result = np.broadcast_to(b, np.broadcast_shapes(a.shape, b.shape, start.shape, size.shape)).copy()
    one = a.dtype.type(1)
    for i in range(bits):
        inside = (i >= start) & (i < start + size)
        bit = (a >> np.clip(i - start, 0, bits - 1).astype(a.dtype)) & one
        mask = a.dtype.type(1 << i)
        result = np.where(inside, (result & ~mask) | (bit << a.dtype.type(i)), result)
    return result


def dot4(a_type: str, b_type: str) -> Callable[[Lanes, Lanes, Lanes], Lanes]:
    """dp4a: four products of bytes, added to c; wraps."""

    def bytes_of(value: Lanes, type_: str) -> NDArray[np.int32]:
        raw = np.ascontiguousarray(value).view(TYPES[type_[0] + "8"])
        return raw.reshape(*value.shape, 4).astype(np.int32)

    def dot(a: Lanes, b: Lanes, c: Lanes) -> Any:
        products = bytes_of(a, a_type) * bytes_of(b, b_type)
        return products.sum(axis=-1, dtype=np.int32) + c

    return dot


def _select(a: Lanes, b: Lanes, condition: Lanes) -> Lanes:
    return np.where(condition, a, b)


def _convert(target: str, source: str, saturate: bool) -> Arithmetic:
    if not saturate:
        return Arithmetic(lambda a: a.astype(TYPES[target]), target, (source,))
    limits, wide = np.iinfo(TYPES[target]), np.iinfo(TYPES[source])
    low, high = max(limits.min, wide.min), min(limits.max, wide.max)
    return Arithmetic(lambda a: np.clip(a, low, high).astype(TYPES[target]), target, (source,))


def _joined(name: str, join: Callable[[Any, Any], Any], type_: str) -> Arithmetic:
    compare = COMPARISONS[name]
    return Arithmetic(lambda a, b, c: join(compare(a, b), c), "pred", (type_, type_, "pred"))


def _arithmetic_table() -> dict[str, Arithmetic]:
    table: dict[str, Arithmetic] = {}
    for t in INTEGERS:
        two: dict[str, Callable[..., Any]] = {
            "add": np.add,
            "sub": np.subtract,
            "mul.lo": np.multiply,
            "div": _divide,
            "rem": _remainder,
            "min": np.minimum,
            "max": np.maximum,
        }
        table |= {f"{name}.{t}": Arithmetic(function, t, (t, t)) for name, function in two.items()}
        table[f"mad.lo.{t}"] = Arithmetic(lambda a, b, c: a * b + c, t, (t, t, t))
        table[f"shr.{t}"] = Arithmetic(_shift_right, t, (t, "u32"))
        if t[0] == "s":
            table[f"abs.{t}"] = Arithmetic(np.abs, t, (t,))
            table[f"neg.{t}"] = Arithmetic(np.negative, t, (t,))
    for t in ("s32", "u32"):
        table[f"mul.hi.{t}"] = Arithmetic(_high, t, (t, t))
        table[f"mad.hi.{t}"] = Arithmetic(lambda a, b, c: _high(a, b).astype(c.dtype) + c, t, (t, t, t))
    for t, w in WIDER.items():
        dtype = TYPES[w]
        table[f"mul.wide.{t}"] = Arithmetic(lambda a, b, d=dtype: a.astype(d) * b.astype(d), w, (t, t))
        table[f"mad.wide.{t}"] = Arithmetic(lambda a, b, c, d=dtype: a.astype(d) * b.astype(d) + c, w, (t, t, w))
    for t in ("s32", "u32", "s64", "u64"):
        table[f"bfe.{t}"] = Arithmetic(extract_bits, t, (t, "u32", "u32"))
    for t in ("b32", "b64"):
        table[f"bfi.{t}"] = Arithmetic(insert_bits, t, (t, t, "u32", "u32"))
    for a in ("s32", "u32"):
        for b in ("s32", "u32"):
            result = "u32" if a == b == "u32" else "s32"
            table[f"dp4a.{a}.{b}"] = Arithmetic(dot4(a, b), result, ("b32", "b32", result))
    return table


def _bits_table() -> dict[str, Arithmetic]:
    table: dict[str, Arithmetic] = {}
    for t in ("pred", "b16", "b32", "b64"):
        table |= {f"{name}.{t}": Arithmetic(function, t, (t, t)) for name, function in LOGIC.items()}
        table[f"not.{t}"] = Arithmetic(np.invert, t, (t,))
        if t != "pred":
            table[f"shl.{t}"] = Arithmetic(_shift_left, t, (t, "u32"))
            table[f"shr.{t}"] = Arithmetic(_shift_right, t, (t, "u32"))
    table["lop3.b32"] = Arithmetic(logic3, "b32", ("b32", "b32", "b32", "u32"))
    table["prmt.b32"] = Arithmetic(permute_bytes, "b32", ("b32", "b32", "u32"))
    for t in ("pred", *INTEGERS, "b16", "b32", "b64", "f32"):
        table[f"mov.{t}"] = Arithmetic(lambda a: a, t, (t,))
        if t != "pred":
            table[f"selp.{t}"] = Arithmetic(_select, t, (t, t, "pred"))
    for space in ("global", "shared"):  # generic addresses are not used: the conversion is the identity
        table[f"cvta.to.{space}.u64"] = Arithmetic(lambda a: a, "u64", ("u64",))
    return table


def _comparison_table() -> dict[str, Arithmetic]:
    table: dict[str, Arithmetic] = {}
    for t in (*INTEGERS, "b16", "b32", "b64"):
        names = {name: name for name in COMPARISONS if t[0] != "b" or name in ("eq", "ne")}
        names |= UNSIGNED_COMPARISONS if t[0] == "u" else {}
        for alias, name in names.items():
            table[f"setp.{alias}.{t}"] = Arithmetic(COMPARISONS[name], "pred", (t, t))
            for word, join in LOGIC.items():
                table[f"setp.{alias}.{word}.{t}"] = _joined(name, join, t)
    kinds = [f"{kind}{bits}" for kind in "su" for bits in (8, 16, 32, 64)]
    for source in kinds:
        for target in kinds:
            table[f"cvt.{target}.{source}"] = _convert(target, source, saturate=False)
            table[f"cvt.sat.{target}.{source}"] = _convert(target, source, saturate=True)
    return table


TABLE = _arithmetic_table() | _bits_table() | _comparison_table()
"""Whole opcode -> meaning. An opcode that is not here is an error, its modifiers included."""
