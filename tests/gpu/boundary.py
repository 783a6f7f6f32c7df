"""The C boundary of the kernels (plugins/include/fptq/kernels.h) through ctypes, emulated or real."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_int32, c_size_t, c_void_p
from pathlib import Path
from typing import Any

from fptq_export.plugin.status import Status
from tests.plugins.emulation.harness import Args, Config, Desc, Device

__all__ = ["SIGNATURES", "Boundary", "boundary_library", "emulated_boundary", "open_boundary"]

ROOT = Path(__file__).resolve().parents[2]

SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "fptqChooseConfig": (c_int, (POINTER(Desc), POINTER(Device), POINTER(Config))),
    "fptqCandidates": (c_int, (POINTER(Desc), POINTER(Device), POINTER(Config), c_int32, POINTER(c_int32))),
    "fptqExplainConfigs": (c_int32, (POINTER(Desc), POINTER(Device), c_char_p, c_int32)),
    "fptqWorkspaceBytes": (c_size_t, (POINTER(Desc), POINTER(Config))),
    "fptqW4A8Linear": (c_int, (POINTER(Desc), POINTER(Config), POINTER(Args), c_void_p)),
    "fptqQuantizeActivation": (c_int, (POINTER(Desc), *(c_void_p,) * 5, c_void_p)),
    "fptqStatusMessage": (c_char_p, (c_int,)),
}
"""Name -> (type of the result, types of the arguments). A test compares them with the header."""

MOST_CANDIDATES = 64


class Boundary:
    """Typed functions of the boundary; `find` gives the address of one by its name."""

    def __init__(self, find: Callable[[str], int]) -> None:
        self._functions = {
            name: ctypes.CFUNCTYPE(result, *arguments)(find(name)) for name, (result, arguments) in SIGNATURES.items()
        }

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function."""
        return self._functions[name](*arguments)

    def message(self, status: int) -> str:
        """The sentence for a status."""
        text: bytes = self.call("fptqStatusMessage", status)
        return text.decode()

    def choose(self, desc: Desc, device: Device) -> Config:
        """The best configuration."""
        config = Config()
        self.check(self.call("fptqChooseConfig", desc, device, config))
        return config

    def candidates(self, desc: Desc, device: Device) -> list[Config]:
        """All sensible configurations, best first."""
        configs, count = (Config * MOST_CANDIDATES)(), c_int32()
        self.check(self.call("fptqCandidates", desc, device, configs, MOST_CANDIDATES, count))
        return list(configs[: count.value])

    def workspace_bytes(self, desc: Desc, config: Config) -> int:
        """Bytes of workspace of a call."""
        return int(self.call("fptqWorkspaceBytes", desc, config))

    def check(self, status: int) -> None:
        """Raises where a status is not OK."""
        if status != Status.OK:
            raise RuntimeError(f"{Status(status).name}: {self.message(status)}")


def emulated_boundary(library: Any) -> Boundary:
    """The functions of an emulated library (`Kernels.c`), which exports them by name."""
    return Boundary(lambda name: ctypes.cast(getattr(library, name), c_void_p).value or 0)


def open_boundary(path: Path) -> Boundary:
    """The functions of a library made by `boundary_library`."""
    library = ctypes.CDLL(str(path))
    library.fptqBoundary.restype = c_void_p
    library.fptqBoundary.argtypes = (c_char_p,)
    return Boundary(lambda name: library.fptqBoundary(name.encode()) or 0)


def boundary_library(build_dir: Path, target: Path, cuda_runtime: Path) -> Path:
    """Link the kernels that `build_plugin` compiled in `build_dir` into a library that gives its functions out.

    Args:
        build_dir: Where CMake built `fptq_trt`; its objects are taken as they are.
        target: The library to write.
        cuda_runtime: `libcudart_static.a` of the toolkit.
    """
    objects = sorted(build_dir.glob("CMakeFiles/fptq_kernels.dir/**/*.o"))
    objects += sorted(build_dir.glob("CMakeFiles/fptq_plugin.dir/**/status.cpp.o"))
    assert len(objects) > 3, f"{build_dir} has no objects of the kernels"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{ROOT / 'plugins' / 'include'}"]
    command += [str(Path(__file__).with_name("exports.cpp")), *map(str, objects), str(cuda_runtime)]
    command += ["-Wl,--no-undefined", "-lpthread", "-ldl", "-lrt", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return target
