"""Memory of the GPU in blocks that are used again, so that a decode step allocates nothing."""

from __future__ import annotations

import ctypes
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from polygraphy.cuda import MemcpyKind, Stream, wrapper
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from fptq_export.errors import UserError

__all__ = ["Block", "DeviceMemory", "Tensors"]

_ALIGNMENT = 256
"""Of a tensor inside a block, in bytes: what cudaMalloc gives, so kernels may read as wide as they like."""
_WHERE = "CUDA"


class Block:
    """Bytes on the GPU, which go back to their pool with the last reference to the block."""

    __slots__ = ("__weakref__", "address", "capacity")

    def __init__(self, address: int, capacity: int) -> None:
        self.address = address
        self.capacity = capacity


@dataclass(frozen=True)
class Tensors:
    """Tensors side by side in one block."""

    block: Block
    addresses: Mapping[str, int]
    """Of an empty tensor too: TensorRT asks for one."""


class DeviceMemory:
    """A pool of blocks, and the one stream on which everything runs in order.

    So a block that went back may be taken at once: what was enqueued on it runs before what comes next. Capacities are
    powers of two: a cache that grows changes its block once for each doubling, and half of it may be unused.

    Raises:
        UserError: There is no CUDA runtime library, or it finds no GPU.
    """

    def __init__(self) -> None:
        try:
            with _explained():
                self._cuda = wrapper()
                self._stream = Stream()
        except OSError as error:
            hint = "install CUDA's runtime library: pip install nvidia-cuda-runtime-cu12"
            raise UserError(_WHERE, f"its runtime library cannot be loaded ({error})", hint) from error
        self._free: dict[int, list[int]] = defaultdict(list)
        self._closed = False

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream.ptr)

    def take(self, size: int) -> Block:
        """A block of so many bytes at least, with anything in them.

        Raises:
            UserError: The GPU has no room for it, or the pool is closed.
        """
        if self._closed:
            raise UserError(_WHERE, "its memory was given back when the session was closed", "open the session again")
        capacity = max(_ALIGNMENT, 1 << (size - 1).bit_length())
        try:
            address = self._free[capacity].pop()
        except IndexError:
            address = self._allocated(capacity)
        block = Block(address, capacity)
        # The bound method keeps the pool as long as there are blocks.
        weakref.finalize(block, self._give_back, address, capacity).atexit = False
        return block

    def place(self, sizes: Mapping[str, int]) -> Tensors:
        """A block with room for tensors of so many bytes each.

        Raises:
            UserError: As `take`.
        """
        offsets, end = {}, 0
        for name, size in sizes.items():
            offsets[name] = end
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        block = self.take(end)
        return Tensors(block, {name: block.address + offset for name, offset in offsets.items()})

    def upload(self, arrays: Mapping[str, NDArray[Any]]) -> Tensors:
        """Arrays on the GPU, by one copy.

        Raises:
            UserError: As `take`.
        """
        tensors = self.place({name: array.nbytes for name, array in arrays.items()})
        starts = {name: address - tensors.block.address for name, address in tensors.addresses.items()}
        staged = np.zeros(max(start + arrays[name].nbytes for name, start in starts.items()), np.uint8)
        for name, start in starts.items():
            staged[start : start + arrays[name].nbytes] = np.frombuffer(arrays[name].tobytes(), np.uint8)
        # CUDA stages pageable memory before the call returns, so `staged` need not live longer.
        self._copy(tensors.block.address, staged.ctypes.data, staged.nbytes, MemcpyKind.HostToDevice)
        return tensors

    def clear(self, block: Block) -> None:
        """Make all bytes of a block zero."""
        pointer, stream = ctypes.c_void_p(block.address), ctypes.c_void_p(self.stream)
        with _explained():
            self._cuda.check(self._cuda.handle.cudaMemsetAsync(pointer, 0, ctypes.c_size_t(block.capacity), stream))

    def copy(self, tensors: Tensors) -> Tensors:
        """The same tensors in another block, copied on the GPU.

        Raises:
            UserError: As `take`.
        """
        old, new = tensors.block, self.take(tensors.block.capacity)
        self._copy(new.address, old.address, old.capacity, MemcpyKind.DeviceToDevice)
        moved = {name: address - old.address + new.address for name, address in tensors.addresses.items()}
        return Tensors(new, moved)

    def download(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A tensor on the GPU as an array, after all that was enqueued before."""
        array: NDArray[Any] = np.empty(shape, dtype)
        self._copy(array.ctypes.data, address, array.nbytes, MemcpyKind.DeviceToHost)
        self.synchronize()
        return array

    def synchronize(self) -> None:
        """Wait for the stream."""
        with _explained():
            self._stream.synchronize()

    def close(self) -> None:
        """Free all blocks, those that are still held when they are given back. Nothing may be taken any more."""
        self._closed = True
        with _explained():
            self._release()
            self._stream.free()

    def _allocated(self, capacity: int) -> int:
        try:
            with _explained():
                return int(self._cuda.malloc(capacity))
        except UserError:
            # An error that is not read is found by the next caller who looks, here TensorRT.
            self._cuda.handle.cudaGetLastError()
        try:
            with _explained():
                self._release()
                return int(self._cuda.malloc(capacity))
        except UserError as error:
            cause = f"the GPU has no room for {capacity / 2**20:.0f} MiB more ({error.cause})"
            raise UserError(
                _WHERE, cause, "run fewer or shorter texts at once, or end what else uses the GPU"
            ) from error

    def _release(self) -> None:
        self._stream.synchronize()
        for addresses in list(self._free.values()):
            while addresses:
                self._cuda.free(addresses.pop())

    def _give_back(self, address: int, capacity: int) -> None:
        if self._closed:
            self._cuda.free(address)
        else:
            self._free[capacity].append(address)

    def _copy(self, to: int, source: int, size: int, kind: Any) -> None:
        with _explained():
            self._cuda.memcpy(to, source, size, kind, self.stream)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            yield
    except PolygraphyException as error:
        said = str(error).partition(". ")[0]
        raise UserError(_WHERE, f"refuses a call ({said})", "fptq-export doctor says what this machine has") from error
