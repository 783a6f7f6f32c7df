"""The machine code of every kernel for every architecture: no spills, nothing slow in the main loop, a budget."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fptq_export.plugin.build import ARCHITECTURES
from tests.plugins.gates import kernels
from tests.plugins.gates.budgets import budget
from tests.plugins.gates.compile import COMPILE_FLAGS, ROOT, SOURCE_DIR, compile_all, nvcc_version
from tests.plugins.gates.gates import GATES, Gate
from tests.plugins.gates.record import RECORDED, WITNESSES, architectures_to_check, counts_of, current_key

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # the first test compiles: some 7 minutes of one core for all architectures
]

DRIFT = 0.10
"""Of a count, when another nvcc compiled than the one that is recorded: another release schedules and addresses anew;
what the algorithm needs, most of the loop, stays."""


@pytest.fixture(scope="module")
def to_check() -> tuple[str, ...]:
    """Compiled without a warning: a warning is an error of nvcc's here."""
    chosen = architectures_to_check(current_key(), RECORDED["key"])
    compile_all(chosen)
    return chosen


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, to_check: tuple[str, ...]) -> str:
    """One after the other with all their tests, so that a listing is read once and then let go."""
    if request.param not in to_check:
        pytest.skip("passed when it was recorded, for the same sources, flags, compiler and gates")
    return str(request.param)


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.__name__)
def test_kernels_keep_within_a_gate(architecture: str, gate: Gate) -> None:
    """The docstring of the gate says what it looks at."""
    assert gate(architecture) == []


def test_only_known_machine_code_is_taken_from_the_record() -> None:
    """Another source, flag or compiler changes the key, and then every architecture is compiled and checked."""
    known = RECORDED["key"]
    assert architectures_to_check(known, known, everything=False) == WITNESSES
    assert architectures_to_check("other", known, everything=False) == ARCHITECTURES
    assert architectures_to_check(known, known, everything=True) == ARCHITECTURES
    assert set(WITNESSES) < set(ARCHITECTURES)


def test_the_key_changes_with_every_source(tmp_path: Path) -> None:
    """A changed header that only one kernel includes is seen."""
    copy = Path(shutil.copytree(SOURCE_DIR, tmp_path / "src"))
    before = current_key(copy)
    assert before == current_key(SOURCE_DIR)
    for name in ("scale_pairs.cuh", "quantize_row.cuh", "w4a8_gemv.cu"):
        with (copy / name).open("a", encoding="utf-8") as file:
            file.write("// changed")
        assert current_key(copy) != before, name
        before = current_key(copy)


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
