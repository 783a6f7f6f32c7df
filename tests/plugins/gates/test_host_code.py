"""Host code of the kernel boundary is built without exceptions, so it may not call what throws."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.plugins.gates.compile import INCLUDE_DIR, SOURCE_DIR

SOURCES = ("config.cpp", "modelled_time.cpp", "w4a8_linear.cpp", "status.cpp", "tactics.cpp")
FLAGS = ("-std=c++20", "-O2", "-fno-exceptions", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDE_DIR}", f"-I{SOURCE_DIR}")
THROWING = ("operator new", "std::__throw", "__cxa_throw", "__cxa_allocate_exception")
"""Demangled symbols: allocation fails by throwing, and a library built without exceptions would end its host."""


def throwing_symbols(source: Path, scratch: Path) -> list[str]:
    """Symbols that a source needs and that throw."""
    if shutil.which("g++") is None or shutil.which("nm") is None:
        pytest.skip("needs g++ and nm")
    target = scratch / "out.o"
    subprocess.run(["g++", *FLAGS, "-c", str(source), "-o", str(target)], check=True, capture_output=True)
    symbols = subprocess.run(
        ["nm", "--demangle", "--undefined-only", str(target)], check=True, capture_output=True, text=True
    )
    return [line.strip() for line in symbols.stdout.splitlines() if any(word in line for word in THROWING)]


@pytest.mark.parametrize("name", SOURCES)
def test_boundary_calls_nothing_that_throws(name: str, tmp_path: Path) -> None:
    """Neither allocation nor a library function that throws is called."""
    assert throwing_symbols(SOURCE_DIR / name, tmp_path) == []


def test_allocation_would_be_seen(tmp_path: Path) -> None:
    """The check above can fail: a vector is found."""
    source = tmp_path / "vector.cpp"
    source.write_text("#include <vector>\nvoid f(std::vector<int>& v) { v.push_back(1); }\n", encoding="utf-8")
    assert throwing_symbols(source, tmp_path) != []
