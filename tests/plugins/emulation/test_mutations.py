"""Tests of the tests: every seeded bug must be caught by the cases of check_everything_small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.plugins.emulation.harness import ROOT, Kernels, build
from tests.plugins.emulation.mutation_run import (
    DEFINES,
    RECORD,
    current_key,
    detect,
    missed_of,
    mutant,
    mutations_to_run,
)
from tests.plugins.emulation.mutations import MUTATIONS, PLAIN_ROWS_OF_A

RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))


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
@pytest.mark.timeout(1800)  # compiles and runs up to 67 mutants; other work on the machine must not fail it
def test_every_mutation_is_caught(base: Path, tmp_path: Path) -> None:
    """Each of the seeded bugs makes a case fail; none passes and none fails to compile."""
    assert missed_of(mutations_to_run(current_key(), RECORDED["key"]), base, tmp_path) == []
    assert len(MUTATIONS) >= 25


def test_only_known_sources_are_taken_from_the_record(tmp_path: Path) -> None:
    """All were caught when it was written; a changed kernel makes all of them run again."""
    assert RECORDED["caught"] == [mutation.name for mutation in MUTATIONS]
    known = RECORDED["key"]
    assert set(mutations_to_run(known, known, everything=False)) < set(MUTATIONS)
    assert mutations_to_run("other", known, everything=False) == tuple(MUTATIONS)
    assert mutations_to_run(known, known, everything=True) == tuple(MUTATIONS)
    copy = Path(shutil.copytree(ROOT / "plugins/src", tmp_path / "src"))
    assert current_key(copy) == current_key()
    with (copy / "scale_pairs.cuh").open("a", encoding="utf-8") as file:
        file.write("// changed")
    assert current_key(copy) != current_key()


def test_bank_conflicts_are_counted(base: Path, tmp_path: Path) -> None:
    """Without the swizzle all results are right: only the conflict counter tells."""
    result = detect(mutant(tmp_path, PLAIN_ROWS_OF_A, base))
    assert result.returncode == 1
    assert "bank conflicts of ldmatrix" in result.stdout
