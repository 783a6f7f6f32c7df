"""The compiled module `_w4a8_cpu`, loaded on first use, and the types of its functions (plugins/cpu/binding.cpp)."""

from __future__ import annotations

import functools
import importlib
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from fptq_export.errors import UserError

__all__ = ["ALIGNMENT", "BUILD_COMMAND", "Extension", "Problem", "aligned_bytes", "load_extension"]

BUILD_COMMAND = "python -m fptq_export.cpu build"
ALIGNMENT = 64
"""Bytes; FPTQ_CPU_ALIGNMENT of plugins/cpu/w4a8_cpu.h."""

Array = NDArray[Any]


class Problem(Protocol):
    """Sizes and types of one call; FptqCpuProblem without the activation mode, which x_scale decides."""

    def workspace_bytes(self) -> int:
        """Bytes of scratch memory the call needs."""


class Extension(Protocol):
    """The module. Arrays are C-contiguous and of exactly the size that the problem needs, else ValueError."""

    InstructionSet: Any

    def make_problem(self, m: int, n: int, k: int, group_size: int, half_input: bool, half_output: bool) -> Problem:
        """Sizes and types of a call; group size 0 is per channel."""

    def supports(self, instruction_set: Any) -> bool:
        """Whether this machine runs an instruction set."""

    def packed_code_bytes(self, n: int, k: int) -> int:
        """Bytes of packed codes."""

    def packed_scale_bytes(self, n: int, k: int, group_size: int) -> int:
        """Bytes of packed scales."""

    def pack_weight(
        self, problem: Problem, codes: Array, scales: Array, packed_codes: Array, packed_scales: Array
    ) -> None:
        """Fill `packed_codes` and `packed_scales`."""

    def quantize_activation(
        self,
        problem: Problem,
        instruction_set: Any,
        threads: int,
        x: Array,
        x_scale: float | None,
        workspace: Array,
        codes: Array,
        scales: Array,
    ) -> None:
        """Fill `codes` and `scales`; x_scale None is per token."""

    def linear(
        self,
        problem: Problem,
        instruction_set: Any,
        threads: int,
        x: Array,
        x_scale: float | None,
        packed_codes: Array,
        packed_scales: Array,
        bias: Array | None,
        workspace: Array,
        y: Array,
    ) -> None:
        """Fill `y`."""

    def group_sums(
        self,
        problem: Problem,
        instruction_set: Any,
        threads: int,
        x: Array,
        x_scale: float | None,
        packed_codes: Array,
        packed_scales: Array,
        workspace: Array,
        sums: Array,
    ) -> None:
        """Fill `sums`, [m, groups, n]."""


@functools.cache
def load_extension() -> Extension:
    """Import the compiled module.

    Raises:
        UserError: It is not built for this Python, or it does not load.
    """
    try:
        return cast(Extension, importlib.import_module("fptq_export.cpu._w4a8_cpu"))
    except ModuleNotFoundError:
        raise UserError(
            "fptq_export.cpu", "its C++ part is not built for this Python", f"run {BUILD_COMMAND}"
        ) from None
    except ImportError as error:
        raise UserError("fptq_export.cpu", f"its C++ part does not load ({error})", f"run {BUILD_COMMAND}") from error


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """Uninitialised bytes that start on a cache line; uint8, [size]."""
    memory = np.empty(size + ALIGNMENT, dtype=np.uint8)
    offset = -memory.ctypes.data % ALIGNMENT
    return memory[offset : offset + size]
