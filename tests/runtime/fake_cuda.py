"""CUDA's runtime library over the memory of this process.

Pointers are real. Each allocation is full of NaN until it is written and after it is freed, and every access is checked
to lie inside one that is live; so wiring, reuse and lengths are executed, not assumed.
"""

# ruff: noqa: D102, N802  methods have the names of CUDA, whose documentation says what they do

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.cuda import Cuda

__all__ = ["DEVICE_TO_DEVICE", "DEVICE_TO_HOST", "HOST_TO_DEVICE", "FakeCudart", "cuda_over"]

OUT_OF_MEMORY, INVALID_VALUE = 2, 1
HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3
NAN_BYTE = 0xFF
"""Makes NaN of FP16, BF16 and FP32 alike."""


class FakeCudart:
    """`libcudart` over host memory, as ctypes calls it: pointers and sizes are ctypes objects; a status goes back."""

    def __init__(self) -> None:
        self.live: dict[int, ctypes.Array[ctypes.c_ubyte]] = {}
        self.streams: set[int] = set()
        self.room = 1 << 40
        """Bytes that may be allocated in all."""
        self.copied: Counter[int] = Counter()
        """Bytes by kind of copy."""
        self.mallocs = 0

    def view(self, address: int, size: int) -> NDArray[np.uint8]:
        """Bytes of one live allocation."""
        for start, memory in self.live.items():
            if start <= address and address + size <= start + len(memory):
                array: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(address))
                return array
        raise AssertionError(f"{size} bytes at {address:#x} are not in one live allocation")

    def cudaMalloc(self, pointer: Any, size: Any) -> int:
        if sum(map(len, self.live.values())) + size.value > self.room:
            return OUT_OF_MEMORY
        memory = (ctypes.c_ubyte * size.value)()
        ctypes.memset(memory, NAN_BYTE, size.value)
        pointer._obj.value = ctypes.addressof(memory)
        self.live[ctypes.addressof(memory)] = memory
        self.mallocs += 1
        return 0

    def cudaFree(self, pointer: Any) -> int:
        memory = self.live.pop(pointer.value, None)
        if memory is None:
            return INVALID_VALUE
        ctypes.memset(memory, NAN_BYTE, len(memory))
        return 0

    def cudaMemcpyAsync(self, to: Any, source: Any, size: Any, kind: Any, stream: Any) -> int:
        assert stream.value in self.streams
        if kind.value in (HOST_TO_DEVICE, DEVICE_TO_DEVICE):
            self.view(to.value, size.value)
        if kind.value in (DEVICE_TO_HOST, DEVICE_TO_DEVICE):
            self.view(source.value, size.value)
        ctypes.memmove(to, source, size.value)
        self.copied[kind.value] += size.value
        return 0

    def cudaMemsetAsync(self, pointer: Any, value: int, size: Any, stream: Any) -> int:
        assert stream.value in self.streams
        self.view(pointer.value, size.value)[:] = value
        return 0

    def cudaStreamCreate(self, pointer: Any) -> int:
        pointer._obj.value = 1 + len(self.streams)
        self.streams.add(pointer._obj.value)
        return 0

    def cudaStreamSynchronize(self, stream: Any) -> int:
        return 0 if stream.value in self.streams else INVALID_VALUE

    def cudaStreamDestroy(self, stream: Any) -> int:
        self.streams.remove(stream.value)
        return 0

    def cudaGetLastError(self) -> int:
        return 0


def cuda_over(cudart: FakeCudart) -> Cuda:
    """Polygraphy's own wrapper over another library."""
    cuda = object.__new__(Cuda)
    cuda.handle = cudart
    return cuda
