"""Which instructions the kernels may use."""

from __future__ import annotations

import functools
from enum import Enum
from typing import Any

from fptq_export.cpu.extension import load_extension
from fptq_export.errors import UserError

__all__ = ["InstructionSet", "available_instruction_sets", "native_from_instruction_set"]


class InstructionSet(Enum):
    """The kernels there are, fastest first. All of them give the same bits."""

    AVX512_VNNI = "avx512_vnni"
    AVX2 = "avx2"
    SCALAR = "scalar"


def available_instruction_sets() -> tuple[InstructionSet, ...]:
    """Those that this machine and its system run, fastest first; never empty.

    Raises:
        UserError: The C++ part is not built.
    """
    return tuple(_native_values())


def native_from_instruction_set(instruction_set: InstructionSet | None) -> Any:
    """The extension's value for an instruction set; None is the fastest of this machine.

    Raises:
        UserError: The machine does not have it, or the C++ part is not built.
    """
    available = _native_values()
    if instruction_set is None:
        return next(iter(available.values()))
    if instruction_set not in available:
        names = ", ".join(item.value for item in available)
        raise UserError(
            f"instruction set {instruction_set.value}", "this machine does not run it", f"choose one of: {names}"
        )
    return available[instruction_set]


@functools.cache
def _native_values() -> dict[InstructionSet, Any]:
    """What this machine runs, fastest first, as the extension calls it."""
    extension = load_extension()
    values = {item: extension.InstructionSet[item.name] for item in InstructionSet}
    return {item: value for item, value in values.items() if extension.supports(value)}
