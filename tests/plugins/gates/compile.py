"""The kernels as machine code for one architecture, compiled once for each state of sources, flags and compiler."""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fptq_export.errors import UserError
from fptq_export.plugin.tools import binaries_of_wheels, find_nvcc
from tests.plugins.gates.sass import Function, Resources, functions_from_sass, resources_from_text

__all__ = ["COMPILE_FLAGS", "SOURCES", "code_of", "compile_all", "nvcc_version", "source_key"]

ROOT = Path(__file__).resolve().parents[3]
SOURCE_DIR = ROOT / "plugins" / "src"
INCLUDE_DIR = ROOT / "plugins" / "include"
CACHE = ROOT / "build" / "gates"
SOURCES = ("w4a8_gemv.cu", "w4a8_gemm.cu", "quantize_activation.cu")
"""Longest to compile first."""
COMPILE_FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-Xptxas=-warn-spills", "--Werror=all-warnings", "-Xcompiler=-Wall")
"""As plugins/CMakeLists.txt compiles a release."""
WORKERS = 2
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


def compile_all(architectures: Sequence[str]) -> None:
    """Compile every source for some architectures; what is in the cache is not compiled again.

    Raises:
        RuntimeError: nvcc failed or warned.
    """
    jobs = [(source, architecture) for source in SOURCES for architecture in architectures]
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(lambda job: cubin(*job), jobs))


def cubin(source: str, architecture: str) -> Path:
    """Machine code of one source."""
    target = CACHE / f"{Path(source).stem}-sm_{architecture}-{source_key(source)[:16]}.cubin"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        partial = Path(scratch) / "out.cubin"
        paths = [f"-I{INCLUDE_DIR}", f"-I{SOURCE_DIR}", str(SOURCE_DIR / source), "-o", str(partial)]
        _run([str(_nvcc()), *COMPILE_FLAGS, f"-arch=sm_{architecture}", "-cubin", *paths])
        for old in CACHE.glob(f"{Path(source).stem}-sm_{architecture}-*.cubin"):
            old.unlink()
        partial.replace(target)
    return target


@functools.lru_cache(maxsize=len(SOURCES))  # of one architecture: a listing takes some 100 MB
def code_of(source: str, architecture: str) -> tuple[dict[str, Function], dict[str, Resources]]:
    """The functions of a source, and what their threads take; by mangled name."""
    path = str(cubin(source, architecture))
    sass = _run([str(_tool("nvdisasm")), "-c", path])
    usage = _run([str(_tool("cuobjdump")), "-res-usage", path])
    return functions_from_sass(sass), resources_from_text(usage)


@functools.cache
def nvcc_version() -> str:
    """As `13.0.88`."""
    found = re.search(r"\bV(\d+\.\d+\.\d+)", _run([str(_nvcc()), "--version"]))
    assert found is not None
    return found.group(1)


@functools.cache
def _nvcc() -> Path:
    try:
        return find_nvcc()
    except UserError as error:
        pytest.skip(f"the machine code of the kernels cannot be checked here: {error}")


@functools.cache
def _tool(name: str) -> Path:
    """A CUDA binary utility: from NVIDIA's wheels, or on PATH."""
    on_path = shutil.which(name)
    found = [*binaries_of_wheels(name), *([Path(on_path)] if on_path else [])]
    if not found:
        pytest.skip(f"the machine code of the kernels cannot be read here: pip install nvidia-cuda-{name}")
    return found[0]


def source_key(source: str, source_dir: Path = SOURCE_DIR) -> str:
    """Names a source with all that it includes, flags and compiler."""
    parts = [nvcc_version().encode(), " ".join(COMPILE_FLAGS).encode()]
    # Not by whole path: the key is the same in every checkout.
    public = INCLUDE_DIR / "fptq"
    files = sorted(set(_closure(source_dir / source)), key=lambda path: (path.parent != public, path.name))
    parts += [path.read_bytes() for path in files]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _closure(path: Path) -> Iterator[Path]:
    """The file and every file of ours that it includes."""
    yield path
    for name in _INCLUDE.findall(path.read_text(encoding="utf-8")):
        for directory in (path.parent, INCLUDE_DIR):
            if (directory / name).is_file():
                yield from _closure(directory / name)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout
