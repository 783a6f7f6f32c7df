"""Build targets: which there are, which one this machine can build, and what to install when it cannot."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import sys
from enum import Enum

from fptq_export.errors import UserError

__all__ = ["Target", "check_target", "is_installed", "module_name", "target_from_option", "visible_gpus"]


class Target(str, Enum):
    """What the graph is turned into."""

    TENSORRT = "tensorrt"
    """TensorRT 10.16 or 11: builds on the NVIDIA GPU machine it runs on."""
    TENSORRT_RTX = "tensorrt-rtx"
    """TensorRT for RTX: builds on any x86-64 machine; runs on GPUs of compute capability 8.x and 12.x."""
    ONNX = "onnx"
    """No engine."""

    def __str__(self) -> str:
        return self.value


_MODULES = {Target.TENSORRT: "tensorrt", Target.TENSORRT_RTX: "tensorrt_rtx"}
_INSTALL = {
    Target.TENSORRT: 'pip install "fptq-export[tensorrt]"',
    Target.TENSORRT_RTX: 'pip install "fptq-export[rtx]"',
}
_RTX_PLATFORMS = {("Linux", "x86_64"), ("Windows", "AMD64")}
"""Platforms with a TensorRT for RTX wheel, as `platform` spells them."""


def module_name(target: Target) -> str | None:
    """Python module that builds for a target; None where there is no engine."""
    return _MODULES.get(target)


def visible_gpus() -> int:
    """Number of GPUs the CUDA driver offers this process; 0 without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def target_from_option(requested: str | None) -> Target:
    """Target named by `--target`; without one, `tensorrt` where it is installed and sees a GPU, else `tensorrt-rtx`.

    Raises:
        UserError: The name is unknown.
    """
    if requested is None:
        usable = is_installed(Target.TENSORRT) and visible_gpus() > 0
        return Target.TENSORRT if usable else Target.TENSORRT_RTX
    try:
        return Target(requested.strip().lower().replace("_", "-"))
    except ValueError:
        known = ", ".join(target.value for target in Target)
        raise UserError("--target", f"{requested!r} is not a target", f"choose one of: {known}") from None


def check_target(target: Target) -> None:
    """Check, without importing it, that the builder of a target is installed and can work on this machine.

    Raises:
        UserError: The platform has no such builder, it is not installed, or it needs a GPU and none is visible.
    """
    if target is Target.ONNX:
        return
    where = f"--target {target}"
    machine = (platform.system(), platform.machine())
    if target is Target.TENSORRT_RTX and machine not in _RTX_PLATFORMS:
        cause = f"TensorRT for RTX has no wheel for {machine[0]} on {machine[1]}, only for x86-64 Linux and Windows"
        raise UserError(where, cause, "build there, or write the portable graph with --target onnx")
    if not is_installed(target):
        raise UserError(where, f"the Python package {_MODULES[target]} is not installed", _INSTALL[target])
    if target is Target.TENSORRT and visible_gpus() == 0:
        cause = "TensorRT builds on the GPU it will run on, and no GPU is visible"
        raise UserError(where, cause, "run on a machine with an NVIDIA GPU, or choose --target tensorrt-rtx")


def is_installed(target: Target) -> bool:
    """Whether the module exists; a bare directory of that name on the path has no origin and does not count."""
    spec = importlib.util.find_spec(_MODULES[target])
    return spec is not None and spec.origin is not None
