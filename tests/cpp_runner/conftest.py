"""The C++ runner, built once with sanitizers: on a machine that is a double, and with the libraries that are here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fptq_export.errors import UserError
from fptq_export.plugin.tools import find_cmake, header_directories
from tests.cpp_runner.model import pairs

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "samples" / "06_cpp_runner"
BUILD = ROOT / "build" / "tests" / "cpp_runner"
SANITIZERS = "address,undefined"
HEADERS = ("NvInferRuntime.h", "cuda.h", "nlohmann/json.hpp")


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def tokens(self) -> list[list[int]]:
        """What `generate` printed."""
        return [[int(word) for word in line.split(",")] for line in self.out.splitlines()]


Runner = Callable[..., Outcome]
"""Words of the command line; `double`: what FPTQ_DOUBLE is to hold."""


def built(target: str, sanitizers: str) -> Path:
    """Build a target; what is up to date is not built again. Skips, with the reason, where a tool is missing."""
    directory = BUILD / (sanitizers.replace(",", "-") or "plain")
    try:
        cmake, ninja = find_cmake()
        places = header_directories(BUILD.parent / "tensorrt-include")
    except UserError as error:
        pytest.skip(f"the C++ runner cannot be built here: {error}")
    missing = [header for header in HEADERS if not any((place / header).is_file() for place in places)]
    if missing:
        pytest.skip(f"the C++ runner cannot be built here: {', '.join(missing)} is missing; next: make env")
    definitions = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "FPTQ_PYTHON": sys.executable,
        "FPTQ_BUILD_TESTS": "ON",
        "FPTQ_SANITIZE": sanitizers,
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_CXX_FLAGS": "-O0",
        "CMAKE_UNITY_BUILD": "ON",  # one reading of each header
        "CMAKE_UNITY_BUILD_BATCH_SIZE": "0",
    }
    options = [f"-D{name}={value}" for name, value in definitions.items()]
    configure = [str(cmake), "-G", "Ninja", "-S", str(SOURCE), "-B", str(directory), *options]
    for command in (configure, [str(cmake), "--build", str(directory), "--target", target]):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return directory / target


def outcome_of(words: list[str], **environment: str) -> Outcome:
    """Run a program to its end."""
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **environment}
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def tests_program() -> Path:
    """`fptq-run-tests` under AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer."""
    return built("fptq-run-tests", SANITIZERS)


@pytest.fixture(scope="session")
def on_double(tests_program: Path) -> Runner:
    """fptq-run on the double, under sanitizers; a finding is a failure."""

    def run(*words: object, double: dict[str, Any] | None = None) -> Outcome:
        command = [str(tests_program), "double", *map(str, words)]
        outcome = outcome_of(command, FPTQ_DOUBLE=pairs(double or {}))
        assert "Sanitizer" not in outcome.err, outcome.err
        assert "runtime error" not in outcome.err, outcome.err
        assert outcome.code in (0, 1), outcome.err
        return outcome

    return run


@pytest.fixture(scope="session")
def rtx_library() -> Path:
    """`libtensorrt_rtx.so.1` of the wheel."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    assert spec is not None, "tensorrt-rtx-cu13 is not installed; next: make env"
    assert spec.origin is not None
    return Path(spec.origin).parent / "libtensorrt_rtx.so.1"
