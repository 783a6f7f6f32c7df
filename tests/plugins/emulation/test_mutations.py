"""Tests of the tests: every seeded bug must be caught by the cases of check_everything_small."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.plugins.emulation.cases import SMALL_SCHEMES, SMALL_TILES
from tests.plugins.emulation.harness import ROOT, SOURCES, Kernels, build
from tests.plugins.emulation.mutations import MUTATIONS, PLAIN_ROWS_OF_A, Mutation

KIND_NAMES = ("FPTQ_PER_CHANNEL", "FPTQ_GROUP", "FPTQ_TWO_LEVEL")
DEFINES = (
    "-DFPTQ_GEMM_TILES(T)=" + " ".join(f"T({', '.join(map(str, tile))})" for tile in SMALL_TILES),
    "-DFPTQ_SCHEMES(S)=" + " ".join(f"S({KIND_NAMES[kind]}, {group})" for kind, group in SMALL_SCHEMES),
)
USERS = {  # the files to compile again when a file changes
    "w4a8_gemm.cuh": ("w4a8_gemm.cu",),
    "gemm_shapes.cuh": ("w4a8_gemm.cu",),
    "scale_pairs.cuh": ("w4a8_gemm.cu",),
    "split_k_reduce.cuh": ("w4a8_gemm.cu",),
    "w4a8_gemv.cuh": ("w4a8_gemv.cu",),
    "scheme.cuh": ("w4a8_gemm.cu", "w4a8_gemv.cu"),
    "quantize_row.cuh": ("quantize_activation.cu", "w4a8_gemv.cu"),
    "bounds.h": ("quantize_activation.cu", "w4a8_gemv.cu"),
}
DETECT_SECONDS = 120  # a mutation that makes the kernels run on is caught, too
WORKERS = 2


def detect(library: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.plugins.emulation.detect", str(library)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DETECT_SECONDS, check=False)


def mutant(directory: Path, mutations: Sequence[Mutation], base: Path) -> Path:
    """A library whose sources have the given edits."""
    sources = directory / "src"
    shutil.copytree(ROOT / "plugins/src", sources)
    changed: set[str] = set()
    for mutation in mutations:
        path = sources / mutation.file
        text = path.read_text(encoding="utf-8")
        assert mutation.old in text, f"{mutation.name}: {mutation.file} no longer contains {mutation.old!r}"
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        changed.update(USERS[mutation.file])
    names = [name for name in (*SOURCES, "cuda_emulation.cpp") if name not in changed]
    return build(directory, sources, {name: base / f"{name}.o" for name in names}, DEFINES)


@pytest.fixture(scope="module")
def base(kernels: Kernels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Objects of the unchanged sources, for fewer tiles and schemes: what does not change is not compiled again."""
    directory = tmp_path_factory.mktemp("base")
    build(directory, defines=DEFINES)
    return directory


def test_unchanged_sources_pass(base: Path) -> None:
    """Without a mutation the cases pass: a caught mutation is caught for its bug."""
    result = detect(base / "libfptq_emulation.so")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiles and runs 67 mutants; other work on the machine must not fail it
def test_every_mutation_is_caught(base: Path, tmp_path: Path) -> None:
    """Each of the seeded bugs makes a case fail; none passes and none fails to compile."""

    def verdict(numbered: tuple[int, Mutation]) -> str | None:
        number, mutation = numbered
        directory = tmp_path / str(number)
        try:
            status = detect(mutant(directory, [mutation], base)).returncode
        except subprocess.TimeoutExpired:
            status = 1
        shutil.rmtree(directory)
        return mutation.name if status == 0 else None

    with ThreadPoolExecutor(WORKERS) as pool:
        missed = [name for name in pool.map(verdict, enumerate(MUTATIONS)) if name is not None]
    assert missed == []
    assert len(MUTATIONS) >= 25


def test_bank_conflicts_are_counted(base: Path, tmp_path: Path) -> None:
    """Without the swizzle all results are right: only the conflict counter tells."""
    result = detect(mutant(tmp_path, PLAIN_ROWS_OF_A, base))
    assert result.returncode == 1
    assert "bank conflicts of ldmatrix" in result.stdout
