"""Builds the plugin libraries with CMake and Ninja."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fptq_export import __version__
from fptq_export.errors import Problem, UserError, UserErrors
from fptq_export.plugin.library import BUILD_DIR, LOADED_LIBRARY, SOURCE_DIR
from fptq_export.plugin.tools import cuda_include_dir, find_cmake, find_nvcc, tensorrt_include_dir

__all__ = ["ARCHITECTURES", "PluginBuild", "build_plugin"]

ARCHITECTURES = ("80", "86", "87", "89", "90", "100", "103", "110", "120", "121")
"""Compute capabilities without the dot that the kernels are written for, oldest first."""
_LOG = "build.log"
_SHOWN_LINES = 20


@dataclass(frozen=True)
class PluginBuild:
    """What to build."""

    architectures: tuple[str, ...] = ARCHITECTURES
    tensorrt_include: Path | None = None
    directory: Path = BUILD_DIR
    """Where CMake works and where the libraries are afterwards."""
    definitions: tuple[str, ...] = ()
    """More CMake variables, as `NAME=VALUE`."""
    targets: tuple[str, ...] = ("fptq_trt", "fptq_trt_static")
    jobs: int | None = None


def build_plugin(build: PluginBuild) -> Path:
    """Build the libraries; what is up to date is not built again.

    Returns:
        `libfptq_trt.so`.

    Raises:
        UserError: A tool is missing, this is no checkout, or the build failed; its log is named.
        UserErrors: An architecture is unknown.
    """
    unknown = [Problem("--arch", f"{text!r} is not supported") for text in set(build.architectures) - {*ARCHITECTURES}]
    if unknown or not build.architectures:
        raise UserErrors("plugin build", unknown, f"choose from: {' '.join(ARCHITECTURES)}")
    if not (SOURCE_DIR / "CMakeLists.txt").is_file():
        raise UserError(str(SOURCE_DIR), "has no sources of the plugin", "build in a checkout of the repository")
    cmake, ninja = find_cmake()
    nvcc = find_nvcc()
    headers = tensorrt_include_dir(build.tensorrt_include, build.directory.parent / "tensorrt-include")
    build.directory.mkdir(parents=True, exist_ok=True)
    variables = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_CUDA_COMPILER": nvcc,
        "CUDA_INCLUDE_DIR": cuda_include_dir(nvcc),
        "TENSORRT_INCLUDE_DIR": headers,
        "FPTQ_ARCHITECTURES": ";".join(sorted(build.architectures, key=ARCHITECTURES.index)),
        "FPTQ_VERSION": __version__,
    }
    definitions = [f"-D{name}={value}" for name, value in variables.items()]
    definitions += [f"-D{definition}" for definition in build.definitions]
    directory = str(build.directory)
    configure = [str(cmake), "-G", "Ninja", "-S", str(SOURCE_DIR), "-B", directory, *definitions]
    jobs = ["--parallel", str(build.jobs)] if build.jobs is not None else []
    compile_ = [str(cmake), "--build", directory, *jobs, "--target", *build.targets]
    _run([configure, compile_], build.directory / _LOG)
    return build.directory / LOADED_LIBRARY


def _run(commands: Sequence[Sequence[str]], log: Path) -> None:
    with log.open("w", encoding="utf-8") as file:
        for command in commands:
            file.write(f"{' '.join(command)}\n")
            file.flush()
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
            if code:
                tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
                cause = f"the build ended with code {code}:" + "".join(f"\n  {line}" for line in tail)
                raise UserError("plugin build", cause, f"the whole log is {log}")
