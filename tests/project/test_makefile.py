"""`make` does no work twice, and CI runs what people run. Nothing is installed here: make only prints its plan."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAMP = Path(".venv") / ".installed"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the Makefile and the two files the environment is made from, older than any stamp."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        os.utime(shutil.copy(ROOT / name, tmp_path), (1, 1))
    (tmp_path / ".venv").mkdir()
    return tmp_path


def planned(project: Path, target: str) -> str:
    """The commands make would run for a target."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "-n", target], cwd=project, env=environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout


@pytest.mark.parametrize("target", ["test", "demo", "lint", "format"])
def test_fresh_clone_gets_its_environment(project: Path, target: str) -> None:
    """Without a stamp every target first installs, with the pins."""
    assert "pip install --quiet --no-compile -c constraints.txt" in planned(project, target)


@pytest.mark.parametrize("target", ["test", "demo", "lint", "format"])
def test_finished_environment_is_left_alone(project: Path, target: str) -> None:
    """With a stamp newer than its inputs nothing is installed again."""
    (project / STAMP).touch()
    assert "-m pip" not in planned(project, target)


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_input_renews_the_environment(project: Path, name: str) -> None:
    """A newer pyproject.toml or constraints.txt installs again."""
    (project / STAMP).touch()
    os.utime(project / name, (2**31, 2**31))
    assert "pip install" in planned(project, "test")


def test_make_test_lints_and_then_tests(project: Path) -> None:
    """`make test` runs both linters, then pytest without the GPU tests."""
    (project / STAMP).touch()
    plan = planned(project, "test")
    steps = ["ruff check", "ruff format --check", "mypy", 'pytest -q -m "not gpu"']
    assert [plan.find(step) for step in steps] == sorted(plan.find(step) for step in steps)
    assert all(step in plan for step in steps)


def test_clean_keeps_the_environment(project: Path) -> None:
    """`make clean` removes what can be made again in a moment, not the environment."""
    assert ".venv" not in planned(project, "clean")


def test_ci_runs_make_test() -> None:
    """`.ci/run` is an executable that calls `make test` and stops at the first error."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert "make test" in text
