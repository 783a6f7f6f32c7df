"""The GPUs of this machine, as the CUDA driver and, where it is installed, NVIDIA's management library see them."""

from __future__ import annotations

import ctypes
import importlib
import sys
from dataclasses import dataclass
from typing import Any

__all__ = ["Driver", "Gpu", "driver_from_cuda", "driver_of_machine"]

_SUCCESS = 0
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the CUDA driver API."""
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """One GPU that the driver offers this process."""

    name: str
    compute_capability: str
    """`8.9`."""


@dataclass(frozen=True)
class Driver:
    """The CUDA driver."""

    cuda_version: str | None
    """Newest CUDA that it runs, e.g. `13.0`; None without a driver."""
    gpus: tuple[Gpu, ...]
    nvidia_version: str | None = None
    """Version of the NVIDIA driver, where the management library says it."""


def driver_of_machine() -> Driver:
    """The driver of this machine; nothing of it is initialised that would hold memory on a GPU."""
    try:
        cuda: Any = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return Driver(None, ())
    return driver_from_cuda(cuda, _nvidia_version())


def driver_from_cuda(cuda: Any, nvidia_version: str | None = None) -> Driver:
    """What a loaded driver library says; no GPUs where it does not start.

    Args:
        cuda: The library: `cuInit`, `cuDriverGetVersion`, `cuDeviceGetCount` and what tells about a device.
        nvidia_version: What is known from elsewhere.
    """
    number = ctypes.c_int()
    known = cuda.cuDriverGetVersion(ctypes.byref(number)) == _SUCCESS
    version = f"{number.value // 1000}.{number.value % 1000 // 10}" if known else None
    if cuda.cuInit(0) != _SUCCESS or cuda.cuDeviceGetCount(ctypes.byref(number)) != _SUCCESS:
        return Driver(version, (), nvidia_version)
    return Driver(version, tuple(_gpu(cuda, index) for index in range(number.value)), nvidia_version)


def _gpu(cuda: Any, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, _NAME_BYTES, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return Gpu(name.value.decode("utf-8", errors="replace"), f"{major.value}.{minor.value}")


def _nvidia_version() -> str | None:
    """Version of the driver from nvidia-ml-py; None where that is not installed or does not answer."""
    try:
        library: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        library.nvmlInit()
    except library.NVMLError:
        return None
    try:
        version = library.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else str(version)
    except library.NVMLError:
        return None
    finally:
        library.nvmlShutdown()
