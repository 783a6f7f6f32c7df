from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fptq_export.cpu.build import build_extension, extension_path, missing_tools
from fptq_export.errors import UserError

ROOT = Path(__file__).parents[3]
INSTRUCTION_SET_SOURCES = ("scalar", "avx2", "avx512_vnni")


@pytest.fixture
def unbuilt_package(tmp_path: Path) -> Path:
    """A copy of the package as pip installs it: no compiled module, no C++ sources beside it."""
    shutil.copytree(
        ROOT / "fptq_export", tmp_path / "fptq_export", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


def run_python(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(package)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=package,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_package_without_its_module_imports_and_names_the_command(unbuilt_package: Path) -> None:
    """Import works; the first use says how to build."""
    done = run_python(unbuilt_package, "-c", "from fptq_export import cpu; cpu.available_instruction_sets()")
    assert "UserError" in done.stderr
    assert "its C++ part is not built for this Python\n  -> run python -m fptq_export.cpu build" in done.stderr


def test_module_that_does_not_load_is_reported_with_its_cause(unbuilt_package: Path) -> None:
    """A broken file is not mistaken for a missing one."""
    (unbuilt_package / "fptq_export" / "cpu" / extension_path().name).write_bytes(b"not a library")
    done = run_python(unbuilt_package, "-c", "from fptq_export import cpu; cpu.available_instruction_sets()")
    assert "its C++ part does not load" in done.stderr
    assert "run python -m fptq_export.cpu build" in done.stderr


def test_build_without_sources_ends_with_a_user_error(unbuilt_package: Path) -> None:
    """`build` in an installed package says where to build, with exit code 1 and no traceback."""
    done = run_python(unbuilt_package, "-m", "fptq_export.cpu", "build")
    assert done.returncode == 1
    assert "build in a clone of the repository" in done.stderr
    assert "Traceback" not in done.stderr


def test_info_lists_what_this_machine_runs() -> None:
    """`info` prints the instruction sets; plain C++ is always among them."""
    done = run_python(ROOT, "-m", "fptq_export.cpu", "info")
    assert done.returncode == 0, done.stderr
    assert "scalar" in done.stdout


def test_missing_tools_are_all_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without cmake and compiler learns of both at once."""
    monkeypatch.setenv("PATH", "")
    assert [tool.partition(" ")[0] for tool in missing_tools()] == ["cmake", "a"]
    with pytest.raises(UserError, match=r"cmake .*a C\+\+20 compiler"):
        build_extension()


def test_failing_build_shows_its_last_lines_and_keeps_the_module(tmp_path: Path) -> None:
    """An error of CMake reaches the user, and the module that works stays."""
    before = extension_path().read_bytes()
    (tmp_path / "CMakeLists.txt").write_text('message(FATAL_ERROR "broken on purpose")\n', encoding="utf-8")
    with pytest.raises(UserError, match="broken on purpose"):
        build_extension(sources=tmp_path, work_dir=tmp_path / "build")
    assert extension_path().read_bytes() == before


@pytest.mark.parametrize("source", INSTRUCTION_SET_SOURCES)
def test_no_instruction_set_shares_code_with_another(source: str) -> None:
    """Objects with their own -m flags export their kernels only: no inline function that other objects could take."""
    folder = ROOT / "build" / f"cpu-{sys.implementation.cache_tag}" / "CMakeFiles" / "w4a8_cpu.dir"
    listing = subprocess.run(
        ["nm", "--defined-only", "--extern-only", "--demangle", str(folder / f"{source}.cpp.o")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    names = [line.split(maxsplit=2)[2] for line in listing.splitlines()]
    assert len(names) == 1, names
    assert names[0].startswith("fptq::cpu::k")
    assert names[0].endswith("Kernels")
