"""What plugins share, in the registry of a real TensorRT for RTX; and what a GPU says, with a CUDA made by the test."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fptq_export.errors import UserError
from fptq_export.plugin.tools import cuda_include_dir, find_nvcc, tensorrt_include_dir
from tests.plugins.lifecycle.test_loading import run
from tests.support.plugin import PLUGIN_BUILD_DIR, ROOT

HERE = Path(__file__).parent
SOURCE = ROOT / "plugins" / "src"


def compiled(target: Path, sources: list[Path], *options: str) -> Path:
    """Compile sources of the plugin and of this folder; skips, with the reason, where headers are missing."""
    try:
        system = [
            cuda_include_dir(find_nvcc()),
            tensorrt_include_dir(None, PLUGIN_BUILD_DIR.parent / "tensorrt-include"),
        ]
    except UserError as error:
        pytest.skip(f"the plugin cannot be built here: {error}")
    flags = [
        "-std=c++20",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fno-exceptions",
        f"-I{ROOT / 'plugins/include'}",
        f"-I{SOURCE}",
    ]
    flags += [f"-I{HERE}", *(word for directory in system for word in ("-isystem", str(directory)))]
    command = ["g++", *flags, *options, *map(str, sources), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


def test_resource_lives_in_the_registry_of_tensorrt(tmp_path: Path) -> None:
    """Two holders share one resource, the last frees it, and the next start anew: each life asks the GPU once."""
    sources = [SOURCE / "device_resource.cpp", SOURCE / "registry.cpp"]
    sources += [HERE / "kernels_double.cpp", HERE / "real_registry.cpp"]
    library = compiled(tmp_path / "libreal.so", sources, "-shared", "-fPIC")
    result = run(f"result['asked'] = ctypes.CDLL('{library}').holdTwice(); result['after'] = found(registry)")
    assert result["asked"] == 2
    assert result["after"] == []


@pytest.mark.parametrize("sanitizers", ["address,undefined"])
def test_answers_of_cuda_are_told_apart(tmp_path: Path, sanitizers: str) -> None:
    """No GPU, a GPU too old, a CUDA error and a good GPU each have their status."""
    sources = [SOURCE / "device.cpp", HERE / "device_test.cpp"]
    program = compiled(tmp_path / "device_test", sources, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g")
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n0 of " in done.stdout
