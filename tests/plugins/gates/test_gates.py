"""The machine code of every kernel for every architecture: no spills, nothing slow in the main loop, a budget."""

from __future__ import annotations

import json
import re

import pytest

from fptq_export.plugin.build import ARCHITECTURES
from fptq_export.roofline.instructions import COUNTS_FILE
from tests.plugins.gates import kernels
from tests.plugins.gates.budgets import budget
from tests.plugins.gates.checks import Code, gemm_problems, gemv_problems, memory_problems
from tests.plugins.gates.compile import COMPILE_FLAGS, ROOT, SOURCE_DIR, code_of, compile_all, nvcc_version
from tests.plugins.gates.record import counts_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # the first test compiles everything: some 7 minutes of one core
]

OTHER_LIMITS = {"split_k_reduce_kernel": 64, "quantize_activation_kernel": 64}
"""Registers: 65536 / 64 = 1024 threads, a whole block of quantize_activation, 8 blocks of the reduction."""
DRIFT = 0.10
"""Of a count, when another nvcc compiled than the one that is recorded: another release schedules and addresses anew;
what the algorithm needs, most of the loop, stays."""
RECORDED = json.loads(COUNTS_FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compiled() -> None:
    """Without a warning: a warning is an error of nvcc's here."""
    compile_all()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, compiled: None) -> str:
    """One after the other with all their tests, so that a listing is read once and then let go."""
    return str(request.param)


def codes(source: str, architecture: str) -> dict[str, Code]:
    functions, resources = code_of(source, architecture)
    assert functions.keys() == resources.keys()
    return {name: Code(function, resources[name]) for name, function in functions.items()}


def test_gemm_keeps_within_its_gates(architecture: str) -> None:
    """Registers, local memory, IMMA, LDGSTS, conversions, calls and the instruction budget of every GEMM kernel."""
    problems = []
    for name, code in codes("w4a8_gemm.cu", architecture).items():
        if kernel := kernels.gemm_from_name(name):
            problems += gemm_problems(kernel, architecture, code)
    assert problems == []


def test_gemv_keeps_within_its_gates(architecture: str) -> None:
    """Registers, local memory, dp4a, 16-byte loads, conversions and calls of every GEMV kernel."""
    problems = []
    for name, code in codes("w4a8_gemv.cu", architecture).items():
        if kernel := kernels.gemv_from_name(name):
            problems += gemv_problems(kernel, architecture, code)
    assert problems == []


def test_other_kernels_use_registers_only(architecture: str) -> None:
    """The reduction of split-K and the quantization neither spill nor take more registers than their blocks leave."""
    found = []
    for source in ("w4a8_gemm.cu", "quantize_activation.cu"):
        for name, code in codes(source, architecture).items():
            limit = next((limit for word, limit in OTHER_LIMITS.items() if word in name), None)
            if limit is not None:
                found.append((name, memory_problems(code, limit)))
    assert len(found) == 4, "three reductions and the quantization"
    assert [problem for problem in found if problem[1]] == []


def test_every_kernel_is_seen(architecture: str) -> None:
    """Every tile with every scheme that fits its registers, and every GEMV, passed through the gates above."""
    text = (SOURCE_DIR / "gemm_tiles.h").read_text(encoding="utf-8")
    tiles = [tuple(map(int, found)) for found in re.findall(r"FPTQ_GEMM_TILE\(" + ", ".join([r"(\d+)"] * 5), text)]
    schemes = [(name.lower(), int(group)) for name, group in re.findall(r"FPTQ_SCHEME\(FPTQ_(\w+), (\d+)\)", text)]
    expected = {kernels.GemmKernel(a, b, c, d, e, *scheme) for a, b, c, d, e in tiles for scheme in schemes}
    too_large = {k for k in expected if k.folds and k.warp_m * k.warp_n > (1024 if k.group_size == 16 else 2048)}
    too_slow = {k for k in expected if (k.scheme, k.group_size, k.warp_m, k.warp_n) == ("two_level", 16, 64, 32)}
    names = code_of("w4a8_gemm.cu", architecture)[0]
    assert {kernels.gemm_from_name(name) for name in names} - {None} == expected - too_large - too_slow
    vectors = {kernels.GemvKernel(rows, scheme, group) for rows in range(1, 5) for scheme, group in schemes}
    assert {kernels.gemv_from_name(name) for name in code_of("w4a8_gemv.cu", architecture)[0]} - {None} == vectors


def test_recorded_counts_are_those_of_the_machine_code(architecture: str) -> None:
    """The time model computes with what the kernels really spend: exactly, or within DRIFT of another compiler's."""
    drift = 0.0 if nvcc_version() == RECORDED["nvcc"] else DRIFT
    measured, recorded = counts_of(architecture), RECORDED["architectures"][architecture]
    assert measured.keys() == recorded.keys()
    for kind in measured:
        assert measured[kind].keys() == recorded[kind].keys()
        for key, counts in measured[kind].items():
            wrong = {s: (n, recorded[kind][key].get(s)) for s, n in counts.items() if recorded[kind][key].get(s) != n}
            bad = {s: pair for s, pair in wrong.items() if pair[1] is None or abs(pair[0] - pair[1]) > drift * pair[1]}
            assert not bad, f"{kind} {key}: {bad}; next: python -m tests.plugins.gates.record"


def test_flags_are_those_of_the_build() -> None:
    """The gates judge what plugins/CMakeLists.txt compiles: the same flags."""
    cmake = (ROOT / "plugins" / "CMakeLists.txt").read_text(encoding="utf-8")
    by_build_type = {"-O3", "-DNDEBUG"}  # CMAKE_CUDA_FLAGS_RELEASE
    assert [flag for flag in COMPILE_FLAGS if flag not in by_build_type and flag not in cmake] == []


@pytest.mark.parametrize(
    ("scheme", "group_size", "expected"),
    [("per_channel", 0, 2.2), ("group", 128, 5.2), ("group", 64, 8.8)]
    + [("two_level", g, 3.0) for g in (128, 64, 32, 16)],
)
def test_budgets_of_large_tiles_are_those_promised(scheme: str, group_size: int, expected: float) -> None:
    """The derived budgets of small tiles never loosen those of the tiles for long prompts, whatever their width."""
    large = [kernels.GemmKernel(128, 128, 64, n, 4, scheme, group_size) for n in (32, 64)]
    assert [budget(kernel) for kernel in large] == [expected, expected]


def test_a_large_tile_without_a_number_is_an_error() -> None:
    """A new scheme of large tiles needs a promise first: no formula fits itself to what was measured."""
    with pytest.raises(KeyError):
        budget(kernels.GemmKernel(128, 128, 64, 32, 4, "group", 16))
