"""A repository with the tiny model, and the real server on it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fptq_export.cli import main
from fptq_export.triton.serving.routing import ROUTE_HEADER
from fptq_export.triton.wheel_server import numpy_directory, wheel_server
from tests.support.triton_server import TritonServer


@pytest.fixture(scope="session", autouse=True)
def _client_is_installed() -> None:
    """Without tritonclient there is nothing to write a config with."""
    if importlib.util.find_spec("tritonclient") is None:
        pytest.skip("tritonclient is not installed; next: make env")


@pytest.fixture(scope="session")
def repository(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with `tiny`, the CPU variant. Tests add models of other names."""
    repository = tmp_path_factory.mktemp("triton") / "models"
    words = ["--repository", str(repository), "--variant", "cpu", "--name", "tiny", "--threads", "1"]
    assert main(["triton", str(finished_run / "run"), *words]) == 0
    return repository


@pytest.fixture(scope="session")
def triton_wheel() -> None:
    """Skip, and say why, where the wheel's server cannot run."""
    if sys.version_info >= (3, 13):
        pytest.skip("the Python backend of the wheel nvidia-pytriton needs NumPy 1, which has no Python 3.13")
    for what, found in (("nvidia-pytriton", importlib.util.find_spec("pytriton")), ("NumPy 1", _has_numpy())):
        if not found:
            pytest.skip(f"{what} is not installed; next: make env")


@pytest.fixture(scope="session")
def server(repository: Path, triton_wheel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The server on the repository, with `tiny` loaded; others are loaded by name."""
    directory = tmp_path_factory.mktemp("tritonserver")
    layout = wheel_server(directory)
    options = [
        "--model-repository",
        str(repository),
        "--model-control-mode=explicit",
        "--load-model=tiny",
    ]
    options.append("--log-verbose=1")  # says which texts were cancelled
    options.append(f"--grpc-header-forward-pattern={ROUTE_HEADER}")
    server = TritonServer((*layout.command, *options), layout.environment, directory / "log")
    server.start()
    yield server
    server.stop()


def _has_numpy() -> bool:
    return (numpy_directory() / "numpy").is_dir()
