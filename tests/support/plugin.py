"""The plugin built without its kernels (a double takes their place): enough for everything but running it."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import pytest

from fptq_export.errors import UserError
from fptq_export.plugin.tools import cuda_include_dir, find_cmake, find_nvcc, tensorrt_include_dir

__all__ = ["PLUGIN_BUILD_DIR", "built_double"]

ROOT = Path(__file__).parents[2]
PLUGIN_BUILD_DIR = ROOT / "build" / "tests" / "plugin"


@functools.cache
def built_double(sanitizers: str = "", *, targets: tuple[str, ...] = ("fptq_trt", "fptq_trt_static")) -> Path:
    """Build targets of `plugins/CMakeLists.txt` with the double; what is up to date is not built again.

    Args:
        sanitizers: `address,undefined`, `thread` or none, for the life-cycle tests.
        targets: What to build.

    Returns:
        The directory they are in. Skips the test, with the reason, where a compiler or TensorRT's headers are missing.
    """
    directory = PLUGIN_BUILD_DIR / (sanitizers.replace(",", "-") or "plain")
    try:
        cmake, ninja = find_cmake()
        variables = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "CUDA_INCLUDE_DIR": cuda_include_dir(find_nvcc()),
            "TENSORRT_INCLUDE_DIR": tensorrt_include_dir(None, PLUGIN_BUILD_DIR.parent / "tensorrt-include"),
            "FPTQ_KERNELS": "double",
            "FPTQ_VERSION": "0.0.test",
            "FPTQ_BUILD_TESTS": "ON",
            "FPTQ_SANITIZE": sanitizers,
        }
    except UserError as error:
        pytest.skip(f"the plugin cannot be built here: {error}")
    definitions = [f"-D{name}={value}" for name, value in variables.items()]
    configure = [str(cmake), "-G", "Ninja", "-S", str(ROOT / "plugins"), "-B", str(directory), *definitions]
    compile_ = [str(cmake), "--build", str(directory), "--target", *targets]
    for command in (configure, compile_):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return directory
