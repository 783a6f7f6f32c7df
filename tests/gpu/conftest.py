"""The real kernels for the GPU of this machine."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from fptq_export.build.targets import Target, module_name
from fptq_export.plugin.build import PluginBuild, build_plugin
from fptq_export.plugin.library import BUILD_DIR
from tests.gpu.boundary import boundary_library, open_boundary
from tests.gpu.driver import CudaMemory, Driver, cuda_device

BUILD_DIRECTORY = BUILD_DIR.with_name("plugin-gpu-tests")


def cuda_runtime(build_dir: Path) -> Path:
    """`libcudart_static.a` that CMake found."""
    cache = (build_dir / "CMakeCache.txt").read_text(encoding="utf-8")
    (path,) = re.findall(r"^CUDA_cudart_static_LIBRARY:FILEPATH=(.+)$", cache, re.MULTILINE)
    return Path(path)


def built_plugin() -> Path:
    """`libfptq_trt.so` with machine code for this GPU only."""
    architecture = str(cuda_device().compute_capability)
    return build_plugin(PluginBuild(architectures=(architecture,), directory=BUILD_DIRECTORY))


def built_boundary(directory: Path) -> Path:
    """The kernels of that library as one that gives their functions out."""
    build_dir = built_plugin().parent
    return boundary_library(build_dir, directory / "libfptq_boundary.so", cuda_runtime(build_dir))


@pytest.fixture(scope="session")
def plugin_library() -> Path:
    """The plugin for this GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU; torch sees none here")
    return built_plugin()


@pytest.fixture(scope="session")
def boundary_path(plugin_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels for this GPU."""
    return built_boundary(tmp_path_factory.mktemp("boundary"))


@pytest.fixture
def device(boundary_path: Path) -> Driver:
    """Calls of the kernels on the GPU."""
    return Driver(open_boundary(boundary_path), CudaMemory())


@pytest.fixture(scope="session", params=[Target.TENSORRT_RTX, Target.TENSORRT])
def target(request: pytest.FixtureRequest) -> Target:
    """Each TensorRT that is installed."""
    chosen = request.param
    assert isinstance(chosen, Target)
    name = module_name(chosen)
    if name is None or importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return chosen
