"""GPUs as the CUDA driver tells of them, through a stand-in for its library."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

from fptq_export.build.gpus import Driver, Gpu, driver_from_cuda

GPUS = ("NVIDIA RTX 4090", "NVIDIA RTX 5090")
CAPABILITIES = {75: (8, 12), 76: (9, 0)}
"""Attribute of the driver API -> its value for each of them."""


def cuda(init_status: int = 0) -> SimpleNamespace:
    """The driver's library: two GPUs behind CUDA 13.1."""

    def write(target: Any, number: int) -> int:
        target._obj.value = number
        return 0

    def name_of(name: Any, size: int, device: ctypes.c_int) -> int:
        name.value = GPUS[device.value].encode()
        return 0

    return SimpleNamespace(
        cuInit=lambda flags: init_status,
        cuDriverGetVersion=lambda number: write(number, 13010),
        cuDeviceGetCount=lambda number: write(number, len(GPUS)),
        cuDeviceGet=write,
        cuDeviceGetName=name_of,
        cuDeviceGetAttribute=lambda number, attribute, device: write(number, CAPABILITIES[attribute][device.value]),
    )


def test_driver_names_its_gpus() -> None:
    """Name and compute capability of each, and the newest CUDA that the driver runs."""
    driver = driver_from_cuda(cuda(), "580.1")
    assert driver == Driver("13.1", (Gpu("NVIDIA RTX 4090", "8.9"), Gpu("NVIDIA RTX 5090", "12.0")), "580.1")


def test_driver_that_does_not_start_has_no_gpus() -> None:
    """A container without its GPUs has the library: its version is known, and nothing else is asked."""
    assert driver_from_cuda(cuda(init_status=100)) == Driver("13.1", ())
