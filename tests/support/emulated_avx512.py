"""The CPU kernels for AVX-512 where there is none: plugins/cpu with the instructions emulated."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from fptq_export.cpu import extension, instruction_set
from fptq_export.cpu.build import extension_path, operators_path
from fptq_export.sources import build_root

__all__ = ["emulated_avx512"]

_SOURCES = Path(__file__).parents[1] / "plugins" / "cpu" / "emulated_avx512"
_MODULE = f"fptq_export.cpu.{extension_path().name.partition('.')[0]}"


@functools.cache
def _built() -> Path:
    """Folder with the module and the operators."""
    work = build_root() / f"cpu-emulated-{sys.implementation.cache_tag}"
    for command in (
        ["cmake", "-S", str(_SOURCES), "-B", str(work), f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", str(work)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return work / "cpu"


@functools.cache
def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location(_MODULE, _built() / extension_path().name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def emulated_avx512() -> Iterator[None]:
    """Let `fptq_export.cpu` and sessions of operators run the emulated build; every instruction set is there."""
    module = _module()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, _MODULE, module)
            patch.setattr("tests.support.ort_operators.operators_path", lambda: _built() / operators_path().name)
            _forget()
            yield
    finally:
        _forget()


def _forget() -> None:
    extension.load_extension.cache_clear()
    instruction_set._native_values.cache_clear()
