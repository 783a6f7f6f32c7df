"""The gates of an architecture: each compiles what it needs, and gives a list of problems, one sentence each."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.plugins.gates import kernels
from tests.plugins.gates.checks import Code, gemm_problems, gemv_problems, memory_problems
from tests.plugins.gates.compile import SOURCE_DIR, code_of

__all__ = ["GATES", "Gate"]

OTHER_LIMITS = {"split_k_reduce_kernel": 64, "quantize_activation_kernel": 64}
"""Registers: 65536 / 64 = 1024 threads, a whole block of quantize_activation, 8 blocks of the reduction."""
_OTHER_KERNELS = 4
"""Three reductions and the quantization."""

Gate = Callable[[str], list[str]]
"""Architecture -> problems."""


def gemm_gate(architecture: str) -> list[str]:
    """Registers, local memory, IMMA, LDGSTS, conversions, calls and the instruction budget of every GEMM kernel."""
    problems = []
    for name, code in _codes("w4a8_gemm.cu", architecture).items():
        if kernel := kernels.gemm_from_name(name):
            problems += gemm_problems(kernel, architecture, code)
    return problems


def gemv_gate(architecture: str) -> list[str]:
    """Registers, local memory, dp4a, 16-byte loads, conversions and calls of every GEMV kernel."""
    problems = []
    for name, code in _codes("w4a8_gemv.cu", architecture).items():
        if kernel := kernels.gemv_from_name(name):
            problems += gemv_problems(kernel, architecture, code)
    return problems


def other_kernels_gate(architecture: str) -> list[str]:
    """The reduction of split-K and the quantization neither spill nor take more registers than their blocks leave."""
    problems, seen = [], 0
    for source in ("w4a8_gemm.cu", "quantize_activation.cu"):
        for name, code in _codes(source, architecture).items():
            limit = next((limit for word, limit in OTHER_LIMITS.items() if word in name), None)
            if limit is not None:
                seen += 1
                problems += [f"{name}: {problem}" for problem in memory_problems(code, limit)]
    return problems if seen == _OTHER_KERNELS else [*problems, f"{seen} kernels, not {_OTHER_KERNELS}"]


def presence_gate(architecture: str) -> list[str]:
    """Every tile with every scheme that fits its registers, and every GEMV, is there for the gates to see."""
    text = (SOURCE_DIR / "gemm_tiles.h").read_text(encoding="utf-8")
    tiles = [tuple(map(int, found)) for found in re.findall(r"FPTQ_GEMM_TILE\(" + ", ".join([r"(\d+)"] * 5), text)]
    schemes = [(name.lower(), int(group)) for name, group in re.findall(r"FPTQ_SCHEME\(FPTQ_(\w+), (\d+)\)", text)]
    expected = {kernels.GemmKernel(a, b, c, d, e, *scheme) for a, b, c, d, e in tiles for scheme in schemes}
    too_large = {k for k in expected if k.folds and k.warp_m * k.warp_n > (1024 if k.group_size == 16 else 2048)}
    too_slow = {k for k in expected if (k.scheme, k.group_size, k.warp_m, k.warp_n) == ("two_level", 16, 64, 32)}
    gemms = {kernels.gemm_from_name(name) for name in code_of("w4a8_gemm.cu", architecture)[0]} - {None}
    vectors = {kernels.GemvKernel(rows, scheme, group) for rows in range(1, 5) for scheme, group in schemes}
    gemvs = {kernels.gemv_from_name(name) for name in code_of("w4a8_gemv.cu", architecture)[0]} - {None}
    differing = (gemms ^ (expected - too_large - too_slow)) | (gemvs ^ vectors)
    return [f"{kernel}: missing, or not expected" for kernel in sorted(differing, key=str)]


GATES: tuple[Gate, ...] = (gemm_gate, gemv_gate, other_kernels_gate, presence_gate)


def _codes(source: str, architecture: str) -> dict[str, Code]:
    functions, resources = code_of(source, architecture)
    if functions.keys() != resources.keys():
        raise RuntimeError(f"{source}, sm_{architecture}: nvdisasm and cuobjdump list different functions")
    return {name: Code(function, resources[name]) for name, function in functions.items()}
