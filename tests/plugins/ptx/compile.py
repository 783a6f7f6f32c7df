"""The product's kernels as PTX text, and its host code as a library on a runtime without a GPU; kept under build/.

One nvcc call a source gives both: the object with the host code, and the PTX that the compiler made on the way.
ptxas does not run: the object carries no machine code.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fptq_export.plugin.tools import cuda_include_dir

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "ptx"
KERNEL_SOURCES = ("w4a8_gemv.cu", "w4a8_gemm.cu", "quantize_activation.cu")  # the slowest first
HOST_SOURCES = ("w4a8_linear.cpp", "config.cpp", "modelled_time.cpp", "status.cpp")
LIBRARY = "libfptq_ptx.so"
WORKERS = 2
KEPT_BUILDS = 6
"""Ten to twenty megabytes each; two for each state of the sources."""


@dataclass(frozen=True)
class Compiled:
    """Where one build is."""

    directory: Path

    @property
    def library(self) -> Path:
        """The host code of the product and the runtime double."""
        return self.directory / LIBRARY

    def modules(self) -> dict[str, str]:
        """PTX text of each source."""
        return {name: (self.directory / name).with_suffix(".ptx").read_text("utf-8") for name in KERNEL_SOURCES}


def compiled(nvcc: Path, architecture: str = "80", selection: str = "") -> Compiled:
    """The build of the sources as they are; made when there is none yet.

    Args:
        nvcc: The compiler.
        architecture: Compute capability without the dot.
        selection: Text before each source: FPTQ_GEMM_TILES or FPTQ_SCHEMES, to compile fewer kernels.
    """
    directory = CACHE / f"{architecture}-{_digest(nvcc, architecture, selection)}"
    if not (directory / LIBRARY).exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, suffix=".partial") as scratch:
            partial = Path(scratch) / "build"
            partial.mkdir()
            _build(nvcc, architecture, selection, partial)
            _publish(partial, directory)
        _forget_old_builds()
    return Compiled(directory)


def _publish(partial: Path, directory: Path) -> None:
    try:
        partial.rename(directory)
    except OSError:  # another process was faster, and made the same
        if not (directory / LIBRARY).exists():
            raise


def _forget_old_builds() -> None:
    builds = [path for path in CACHE.iterdir() if (path / LIBRARY).exists()]
    for path in sorted(builds, key=lambda path: path.stat().st_mtime)[:-KEPT_BUILDS]:
        shutil.rmtree(path, ignore_errors=True)  # another process may remove it, too


def _digest(nvcc: Path, architecture: str, selection: str) -> str:
    version = subprocess.run([str(nvcc), "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + architecture.encode() + selection.encode())
    for file in (*_sources(), HERE / "cuda_runtime.cpp", Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _sources() -> list[Path]:
    """The sources, and the product's headers that they include."""
    folders = (ROOT / "plugins/src", ROOT / "plugins/include")
    found: dict[Path, None] = {}
    open_ = [folders[0] / name for name in (*KERNEL_SOURCES, *HOST_SOURCES)]
    while open_:
        path = open_.pop()
        if path in found:
            continue
        found[path] = None
        for name in re.findall(r'^#include "(.+)"', path.read_text("utf-8"), re.MULTILINE):
            open_ += [folder / name for folder in folders if (folder / name).exists()]
    return sorted(found)


def _build(nvcc: Path, architecture: str, selection: str, directory: Path) -> None:
    (directory / "selection.h").write_text(selection, encoding="utf-8")
    include = [f"-I{ROOT / 'plugins/include'}", f"-I{ROOT / 'plugins/src'}"]
    device = [str(nvcc), "-std=c++20", f"-gencode=arch=compute_{architecture},code=compute_{architecture}"]
    host = ["g++", "-std=c++20", "-fPIC", "-O1", f"-I{cuda_include_dir(nvcc)}", *include]
    commands = []
    for name in KERNEL_SOURCES:
        keep = directory / f"{name}.keep"
        keep.mkdir()
        flags = ["-Xcompiler=-fPIC", "--keep", "--keep-dir", str(keep), "-include", str(directory / "selection.h")]
        source = ROOT / "plugins/src" / name
        commands.append([*device, *flags, *include, "-c", str(source), "-o", str(directory / f"{name}.o")])
    for path in (*(ROOT / "plugins/src" / name for name in HOST_SOURCES), HERE / "cuda_runtime.cpp"):
        commands.append([*host, "-c", str(path), "-o", str(directory / f"{path.name}.o")])
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(_run, commands))
    objects = sorted(str(path) for path in directory.glob("*.o"))
    _run(["g++", "-shared", *objects, "-o", str(directory / LIBRARY)])
    for path in directory.glob("*.o"):
        path.unlink()
    for name in KERNEL_SOURCES:
        keep = directory / f"{name}.keep"
        (keep / name).with_suffix(".ptx").rename((directory / name).with_suffix(".ptx"))
        shutil.rmtree(keep)


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{(result.stderr + result.stdout)[:4000]}")
