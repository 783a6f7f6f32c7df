"""The product's library on the interpreter, and the emulated one beside it."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from fptq_export.errors import UserError
from fptq_export.plugin.tools import find_nvcc
from tests.plugins.emulation.harness import Kernels, cached_library
from tests.plugins.ptx.agreement import FEW_KERNELS, OTHER_ARCHITECTURE
from tests.plugins.ptx.compile import ROOT, Compiled, compiled
from tests.plugins.ptx.launch import Interpreted, Program

EMULATION_CACHE = ROOT / ".pytest_cache" / "plugin-emulation"


@pytest.fixture(scope="session")
def nvcc() -> Path:
    try:
        return find_nvcc()
    except UserError as error:
        pytest.skip(f"PTX text needs nvcc: {error.cause}")


@pytest.fixture(scope="session")
def emulated() -> Kernels:
    if shutil.which("g++") is None:
        pytest.skip("the emulated kernels need g++")
    if platform.machine() != "x86_64":
        pytest.skip(f"the emulator's fibers are written for x86-64, this is {platform.machine()}")
    return Kernels(cached_library(EMULATION_CACHE))


@pytest.fixture(scope="session")
def product(nvcc: Path) -> Compiled:
    """All kernels, for the oldest architecture."""
    return compiled(nvcc)


@pytest.fixture(scope="session")
def interpreted(product: Compiled) -> Interpreted:
    return Interpreted(product.library, Program(product.modules()))


@pytest.fixture(scope="session")
def other_architecture(nvcc: Path) -> Interpreted:
    """Some kernels, as a newer part of the compiler translates them."""
    build = compiled(nvcc, OTHER_ARCHITECTURE, FEW_KERNELS)
    return Interpreted(build.library, Program(build.modules()))
