"""What the build needs from the machine: CMake, nvcc and the headers of TensorRT."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from fptq_export.errors import UserError

__all__ = ["cuda_include_dir", "find_cmake", "find_nvcc", "tensorrt_include_dir"]

HEADER = "NvInferRuntime.h"
_CUDA_HEADER = "cuda_runtime_api.h"
HEADER_WHEEL = "kernel-lens==2.0.1"
"""A small package on PyPI that carries NVIDIA's TensorRT 10.14 headers (Apache-2.0); unpacked, never installed."""
_HEADER_PLACES = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/include",
    "/usr/local/tensorrt/include",
)
_CUDA_WHEELS = "pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl"


def find_cmake() -> tuple[Path, Path]:
    """(cmake, ninja). Raises UserError where one is missing."""
    found = [shutil.which(name) for name in ("cmake", "ninja")]
    if found[0] is None or found[1] is None:
        raise UserError("plugin build", "cmake or ninja is not installed", "pip install cmake ninja")
    return Path(found[0]), Path(found[1])


def find_nvcc() -> Path:
    """Find nvcc on PATH, in CUDA_HOME, or in NVIDIA's wheels from PyPI.

    Raises:
        UserError: There is none.
    """
    for candidate in _nvcc_candidates():
        if candidate.is_file():
            return candidate
    raise UserError("plugin build", "nvcc is not on PATH, in CUDA_HOME or installed as a wheel", _CUDA_WHEELS)


def _nvcc_candidates() -> Iterator[Path]:
    on_path = shutil.which("nvcc")
    if on_path is not None:
        yield Path(on_path).resolve()
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield Path(home) / "bin" / "nvcc"
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations if spec is not None else None) or []:
        yield from sorted(Path(place).glob("*/bin/nvcc"), reverse=True)


def cuda_include_dir(nvcc: Path) -> Path:
    """Directory of `cuda_runtime_api.h` of the toolkit that nvcc belongs to. Raises UserError where it is missing."""
    # Where nvcc is a wrapper script, its own dry run is the only one to know the toolkit.
    told = subprocess.run([str(nvcc), "--dryrun", "-x", "cu", "-"], capture_output=True, text=True, check=False).stderr
    top = next((line.rpartition("=")[2].strip() for line in told.splitlines() if "TOP=" in line), None)
    roots = [nvcc.parents[1], *([Path(top)] if top else []), Path("/usr/local/cuda")]
    for root in roots:
        for include in (root / "include", *root.glob("targets/*/include")):
            if (include / _CUDA_HEADER).is_file():
                return include.resolve()
    raise UserError(str(nvcc), f"there is no {_CUDA_HEADER} beside it", _CUDA_WHEELS)


def tensorrt_include_dir(given: Path | None, cache: Path) -> Path:
    """Directory of TensorRT's headers: the one given, a system install, else the ones a PyPI wheel carries.

    Args:
        given: `--tensorrt-include`.
        cache: Where headers from the wheel are unpacked, and found again.

    Raises:
        UserError: The one given has no headers, or there are none and none can be downloaded.
    """
    if given is not None:
        if not (given / HEADER).is_file():
            raise UserError(str(given), f"has no {HEADER}", "give the include directory of TensorRT 10.14 or newer")
        return given.resolve()
    root = os.environ.get("TENSORRT_ROOT")
    places = [*([Path(root) / "include"] if root else []), *map(Path, _HEADER_PLACES), cache]
    for place in places:
        if (place / HEADER).is_file():
            return place.resolve()
    _unpack_headers(cache)
    return cache.resolve()


def _unpack_headers(target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, HEADER_WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheel = next(Path(scratch).glob("*.whl"), None)
        if done.returncode or wheel is None:
            cause = (
                f"there are no TensorRT headers here, and {HEADER_WHEEL} cannot be downloaded: {done.stderr.strip()}"
            )
            raise UserError("plugin build", cause, "give --tensorrt-include DIR")
        with zipfile.ZipFile(wheel) as archive:
            headers = [name for name in archive.namelist() if Path(name).name.startswith("NvInfer")]
            target.mkdir(parents=True, exist_ok=True)
            # The header that the search looks for is written last: a torn unpacking is not taken for a whole one.
            for name in sorted(headers, key=lambda name: Path(name).name == HEADER):
                (target / Path(name).name).write_bytes(archive.read(name))
