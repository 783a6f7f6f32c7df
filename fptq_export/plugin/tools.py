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

__all__ = [
    "binaries_of_wheels",
    "cuda_include_dir",
    "find_cmake",
    "find_nvcc",
    "header_directories",
    "tensorrt_include_dir",
]

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
_WHEEL_FILES = {
    "bin/nvcc": "nvidia-cuda-nvcc",
    "nvvm/bin/cicc": "nvidia-nvvm",
    "include/crt/host_config.h": "nvidia-cuda-crt",
    f"include/{_CUDA_HEADER}": "nvidia-cuda-runtime",
    "include/cccl/nv/target": "nvidia-cuda-cccl",
}
"""What the build needs of a toolkit from PyPI -> the wheel that brings it (layout of CUDA 13: `nvidia/cu13/`)."""
_CUDA_WHEELS = f"pip install {' '.join(_WHEEL_FILES.values())}, or fptq-export[plugin]"


def find_cmake() -> tuple[Path, Path]:
    """(cmake, ninja). Raises UserError where one is missing."""
    found = [shutil.which(name) for name in ("cmake", "ninja")]
    if found[0] is None or found[1] is None:
        raise UserError("plugin build", "cmake or ninja is not installed", "pip install cmake ninja")
    return Path(found[0]), Path(found[1])


def find_nvcc() -> Path:
    """Find nvcc on PATH, in CUDA_HOME, or in NVIDIA's wheels from PyPI.

    Raises:
        UserError: There is none, or it comes from a wheel and another wheel of the toolkit is missing.
    """
    for candidate in _installed_nvcc():
        if candidate.is_file():
            return candidate
    for candidate in binaries_of_wheels("nvcc"):
        missing = [wheel for file, wheel in _WHEEL_FILES.items() if not (candidate.parents[1] / file).is_file()]
        if missing:
            cause = f"this nvcc comes from PyPI, and of its toolkit is missing: {', '.join(missing)}"
            raise UserError(str(candidate), cause, f"pip install {' '.join(missing)}")
        return candidate
    raise UserError("plugin build", "nvcc is not on PATH, in CUDA_HOME or installed as a wheel", _CUDA_WHEELS)


def binaries_of_wheels(name: str) -> list[Path]:
    """A CUDA program in NVIDIA's wheels from PyPI, the newest toolkit first. Wheels do not put theirs on PATH."""
    spec = importlib.util.find_spec("nvidia")
    places = (spec.submodule_search_locations if spec is not None else None) or []
    found = [path for place in places for path in Path(place).glob(f"cu[0-9]*/bin/{name}")]
    return sorted(found, key=lambda path: int(path.parents[1].name.removeprefix("cu")), reverse=True)


def _installed_nvcc() -> Iterator[Path]:
    on_path = shutil.which("nvcc")
    if on_path is not None:
        yield Path(on_path).resolve()
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield Path(home) / "bin" / "nvcc"


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


def header_directories(cache: Path) -> list[Path]:
    """Directories of headers for C++ that loads engines: TensorRT's, CUDA's, nlohmann-json's, as far as they are here.

    Args:
        cache: As for `tensorrt_include_dir`.

    Raises:
        UserError: As `tensorrt_include_dir`.
    """
    found = [tensorrt_include_dir(None, cache)]
    try:
        found.append(cuda_include_dir(find_nvcc()))
    except UserError:
        # Without a compiler: a toolkit's own place, and the wheel of the runtime.
        found += [place for place in _cuda_header_places() if (place / _CUDA_HEADER).is_file()]
    spec = importlib.util.find_spec("nlohmann_json")
    if spec is not None and spec.origin is not None:
        found.append(Path(spec.origin).parent / "include")
    return found


def _cuda_header_places() -> Iterator[Path]:
    yield Path("/usr/local/cuda/include")
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations if spec is not None else None) or []:
        yield from sorted(Path(place).glob("*/include"), reverse=True)


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
