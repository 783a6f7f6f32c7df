"""Compile plugins/cpu into this package: `python -m fptq_export.cpu build`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from fptq_export.errors import UserError
from fptq_export.files import atomic_path
from fptq_export.sources import build_root, source_root

__all__ = ["build_extension", "extension_path", "missing_tools", "operators_path"]

_PACKAGE = Path(__file__).parent
_SOURCES = source_root() / "cpu"
_WORK_DIR = build_root()
_SHOWN_LINES = 20


def extension_path() -> Path:
    """Where the module of this Python stands once it is built."""
    return _PACKAGE / f"_w4a8_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"


def operators_path() -> Path:
    """Where the library with the operators of ONNX Runtime (domain `fptq.cpu`) stands once it is built."""
    return _PACKAGE / "libfptq_ort_ops.so"


def missing_tools() -> tuple[str, ...]:
    """What the build needs and this machine lacks, each with the way to get it; empty when nothing is missing."""
    missing = []
    if shutil.which("cmake") is None:
        missing.append("cmake (apt install cmake, or pip install cmake)")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        missing.append("a C++20 compiler (apt install g++, or set CXX)")
    if importlib.util.find_spec("nanobind") is None:
        missing.append("nanobind (pip install nanobind)")
    return tuple(missing)


def build_extension(sources: Path = _SOURCES, work_dir: Path = _WORK_DIR) -> Path:
    """Compile what changed since the last call, and put the module and the operators into this package.

    Each file appears whole or not at all.

    Args:
        sources: Folder with the CMakeLists.txt.
        work_dir: Where CMake works; each Python has a folder of its own in it.

    Returns:
        The path of the module.

    Raises:
        UserError: The sources, a tool or write access are missing, or the compiler fails.
    """
    if not (sources / "CMakeLists.txt").is_file():
        raise UserError(
            str(sources), "no C++ sources here", "install fptq-export again, or build in a clone of the repository"
        )
    if missing := missing_tools():
        raise UserError("build of fptq_export.cpu", f"missing: {', '.join(missing)}", "install it and run again")
    work = work_dir / f"cpu-{sys.implementation.cache_tag}"
    _run(["cmake", "-S", str(sources), "-B", str(work), f"-DPython_EXECUTABLE={sys.executable}"])
    _run(["cmake", "--build", str(work), "--parallel", str(os.cpu_count() or 1)])
    target = extension_path()
    for built in (operators_path(), target):
        with atomic_path(built) as partial:
            shutil.copyfile(work / built.name, partial)
    importlib.invalidate_caches()  # a failed import of this process may have cached the folder without the module
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    tail = "\n".join((done.stdout + done.stderr).splitlines()[-_SHOWN_LINES:])
    raise UserError(
        " ".join(command), f"exit code {done.returncode}\n{tail}", "mend what the last lines say, run again"
    )
