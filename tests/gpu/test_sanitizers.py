"""The kernels under compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.boundary import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

FOUND = 66
"""Exit code for a finding; none of Python's."""
SECONDS = 3600


def find_tool() -> str | None:
    """compute-sanitizer of PATH or of the toolkit in CUDA_HOME."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places = [os.environ.get("PATH", ""), *(str(Path(home) / "bin") for home in homes)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer_finds_nothing(boundary_path: Path, tool: str) -> None:
    """No access out of bounds, no race in shared memory, no barrier in divergent code, and right results."""
    program = find_tool()
    if program is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in CUDA_HOME/bin")
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND)]
    command += [sys.executable, "-m", "tests.gpu.sanitized_calls", str(boundary_path)]
    # Torch's allocator hides where a tensor ends: without it each buffer is an allocation of its own.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=SECONDS, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
