"""The emulated kernels, built once for each state of their sources."""

from __future__ import annotations

import platform
import shutil

import pytest

from tests.plugins.emulation.harness import ROOT, Kernels, cached_library

CACHE = ROOT / ".pytest_cache" / "plugin-emulation"


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    if shutil.which("g++") is None:
        pytest.skip("the emulated kernels need g++")
    if platform.machine() != "x86_64":
        pytest.skip(f"the emulator's fibers are written for x86-64, this is {platform.machine()}")
    return Kernels(cached_library(CACHE))
