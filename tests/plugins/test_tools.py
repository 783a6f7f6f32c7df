"""Finding nvcc and the other programs of CUDA: installed, in CUDA_HOME, or in NVIDIA's wheels from PyPI."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
from pathlib import Path

import pytest

from fptq_export.errors import UserError
from fptq_export.plugin.tools import binaries_of_wheels, cuda_include_dir, find_nvcc

WHEEL_FILES = {
    "nvidia-cuda-nvcc": "bin/nvcc",
    "nvidia-nvvm": "nvvm/bin/cicc",
    "nvidia-cuda-crt": "include/crt/host_config.h",
    "nvidia-cuda-runtime": "include/cuda_runtime_api.h",
    "nvidia-cuda-cccl": "include/cccl/nv/target",
}
"""Wheel -> a file it installs below `nvidia/cu13`, as of CUDA 13.5."""


@pytest.fixture
def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment without CUDA, whose `nvidia` namespace package is the returned folder."""
    place = tmp_path / "site-packages" / "nvidia"
    place.mkdir(parents=True)
    spec = importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    spec.submodule_search_locations = [str(place)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "nvidia" else None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    return place


def install(nvidia: Path, wheels: set[str], toolkit: str = "cu13") -> Path:
    for wheel in wheels:
        file = nvidia / toolkit / WHEEL_FILES[wheel]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("#!/bin/sh\n", encoding="utf-8")
        file.chmod(0o755)
    return nvidia / toolkit


def test_nvcc_of_the_wheels_is_found(nvidia: Path) -> None:
    """With every wheel of the toolkit, nvcc and the headers beside it are taken from there."""
    root = install(nvidia, set(WHEEL_FILES))
    nvcc = find_nvcc()
    assert nvcc == root / "bin" / "nvcc"
    assert cuda_include_dir(nvcc) == (root / "include").resolve()


@pytest.mark.parametrize("missing", sorted(set(WHEEL_FILES) - {"nvidia-cuda-nvcc"}))
def test_missing_wheel_is_named(nvidia: Path, missing: str) -> None:
    """An incomplete toolkit is refused before nvcc fails on it, with the wheel to install."""
    install(nvidia, set(WHEEL_FILES) - {missing})
    with pytest.raises(UserError, match=rf"missing: {missing}\b") as caught:
        find_nvcc()
    assert f"pip install {missing}" in str(caught.value)


def test_no_nvcc_says_how_to_get_one(nvidia: Path) -> None:
    """Nothing installed: the error names every wheel."""
    with pytest.raises(UserError) as caught:
        find_nvcc()
    assert all(wheel in str(caught.value) for wheel in WHEEL_FILES)


def test_cuda_home_wins_over_wheels(nvidia: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A toolkit that somebody chose is taken, whatever is in site-packages."""
    install(nvidia, set(WHEEL_FILES))
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1]))
    assert find_nvcc() == nvcc


def test_newest_toolkit_of_the_wheels_comes_first(nvidia: Path) -> None:
    """Of several toolkits the number decides, not the spelling: 13 before 9."""
    older, newer = (install(nvidia, {"nvidia-cuda-nvcc"}, name) for name in ("cu9", "cu13"))
    assert binaries_of_wheels("nvcc") == [newer / "bin" / "nvcc", older / "bin" / "nvcc"]
