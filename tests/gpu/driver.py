"""One call of the kernels, in the memory of the host for the emulated ones or of a GPU for the real ones."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tests.gpu.boundary import Boundary
from tests.plugins.emulation.harness import (
    OUTPUT_TYPES,
    PER_TOKEN,
    STATIC,
    Args,
    Config,
    Desc,
    Device,
    Kernels,
    Quantized,
    aligned_copy,
)
from tests.plugins.emulation.weights import PER_CHANNEL, Weight, padded

__all__ = ["Buffer", "CudaMemory", "Driver", "HostMemory", "Memory", "PreparedLinear", "cuda_device"]

ALIGNMENT = 256
GUARD_BYTES = 256
GUARD = 0x5A


class Buffer(Protocol):
    """Bytes that a kernel may read, and write where it was made so."""

    @property
    def pointer(self) -> int:
        """Address for the kernel."""

    def download(self) -> NDArray[np.uint8]:
        """The bytes as they are now."""


class Memory(Protocol):
    """Where buffers live."""

    def reset(self) -> None:
        """Before the first buffer of a call."""

    def upload(self, array: NDArray[Any], *, writable: bool = False, offset: int = 0) -> Buffer:
        """A copy at an address that is a multiple of 256, plus `offset`."""

    def stream(self) -> int:
        """The stream to launch on."""


@dataclass(frozen=True)
class HostBuffer:
    """Bytes in an array."""

    array: NDArray[np.uint8]

    @property
    def pointer(self) -> int:
        """As in Buffer."""
        return int(self.array.ctypes.data)

    def download(self) -> NDArray[np.uint8]:
        """As in Buffer."""
        return self.array.copy()


class HostMemory:
    """Memory of the emulated kernels, which refuse every address they were not given."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def reset(self) -> None:
        """Forget the buffers of the call before."""
        self._kernels.c.emulation_reset()
        self._kernels.options()

    def upload(self, array: NDArray[Any], *, writable: bool = False, offset: int = 0) -> HostBuffer:
        """As in Memory."""
        copy = aligned_copy(_bytes(array), offset)
        self._kernels.add_range(copy, "buffer", writable=writable)
        return HostBuffer(copy)

    def stream(self) -> int:
        """There is none."""
        return 0


@dataclass(frozen=True)
class CudaBuffer:
    """Bytes in a tensor; `storage` keeps them alive."""

    storage: torch.Tensor
    view: torch.Tensor

    @property
    def pointer(self) -> int:
        """As in Buffer."""
        return self.view.data_ptr()

    def download(self) -> NDArray[np.uint8]:
        """As in Buffer; waits for the current stream."""
        result: NDArray[np.uint8] = self.view.cpu().numpy()
        return result


class CudaMemory:
    """Memory of the current GPU; launches go to torch's current stream."""

    def reset(self) -> None:
        """Nothing to do: torch frees what nobody holds."""

    def upload(self, array: NDArray[Any], *, writable: bool = False, offset: int = 0) -> CudaBuffer:
        """As in Memory."""
        data = torch.from_numpy(_bytes(array))
        storage = torch.zeros(data.numel() + 2 * ALIGNMENT, dtype=torch.uint8, device="cuda")
        start = -storage.data_ptr() % ALIGNMENT + offset
        view = storage[start : start + data.numel()]
        view.copy_(data)
        return CudaBuffer(storage, view)

    def stream(self) -> int:
        """Torch's current stream."""
        return int(torch.cuda.current_stream().cuda_stream)


def cuda_device() -> Device:
    """The current GPU as the choice of a configuration wants it."""
    found: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(10 * found.major + found.minor, found.multi_processor_count, found.shared_memory_per_block_optin)


@dataclass(frozen=True)
class PreparedLinear:
    """A call with its buffers in place: may be launched any number of times."""

    launch: Callable[[], int]
    """Enqueues the call on the memory's current stream; returns its status."""
    output: Callable[[], NDArray[Any]]
    """y [m, n] as it is now; raises where a byte past it was written."""


class Driver:
    """Calls of the boundary over one memory."""

    def __init__(self, boundary: Boundary, memory: Memory) -> None:
        self.boundary = boundary
        self.memory = memory

    def prepare(
        self,
        x: NDArray[Any],
        weight: Weight,
        config: Config,
        *,
        static_scale: float | None = None,
        bias: NDArray[Any] | None = None,
        x_offset: int = 0,
    ) -> PreparedLinear:
        """Upload the operands of fptqW4A8Linear; x [m, k] FP16 or BF16, which is also the output type."""
        m, k = x.shape
        n = weight.values.shape[0]
        mode = PER_TOKEN if static_scale is None else STATIC
        output_type = OUTPUT_TYPES.index(x.dtype.type)
        desc = Desc(m, n, k, weight.kernel_group, weight.scheme, mode, output_type, int(bias is not None))
        self.memory.reset()
        size = self.boundary.workspace_bytes(desc, config)
        scale = None if static_scale is None else np.array([static_scale], dtype=np.float32)
        operands = {"x": x, "weight_codes": weight.codes, "weight_scales": weight.scale_bytes}
        optional = {"channel_scales": weight.channel_scales, "x_scale": scale, "bias": bias}
        operands |= {name: array for name, array in optional.items() if array is not None}
        buffers: dict[str, Buffer] = {
            name: self.memory.upload(array, offset=x_offset if name == "x" else 0) for name, array in operands.items()
        }
        buffers["workspace"] = self.memory.upload(np.full(max(size, 1), 0xA5, dtype=np.uint8), writable=True)
        y_bytes = m * n * x.dtype.itemsize
        y = self.memory.upload(np.full(y_bytes + GUARD_BYTES, GUARD, dtype=np.uint8), writable=True)
        pointers = {name: buffer.pointer for name, buffer in buffers.items()}
        args = Args(**pointers, y=y.pointer, workspace_bytes=size)

        def launch() -> int:
            # The buffers are held by this function for as long as the call can be launched.
            assert all(buffer.pointer == pointers[name] for name, buffer in buffers.items())
            stream = ctypes.c_void_p(self.memory.stream())
            return int(self.boundary.call("fptqW4A8Linear", desc, config, args, stream))

        def output() -> NDArray[Any]:
            content = y.download()
            assert (content[y_bytes:] == GUARD).all(), "wrote past y"
            return content[:y_bytes].view(x.dtype).reshape(m, n)

        return PreparedLinear(launch, output)

    def linear(self, x: NDArray[Any], weight: Weight, config: Config, **options: Any) -> NDArray[Any]:
        """Y [m, n] of one call; raises where it fails."""
        prepared = self.prepare(x, weight, config, **options)
        self.boundary.check(prepared.launch())
        return prepared.output()

    def quantize(self, x: NDArray[Any], static_scale: float | None = None) -> Quantized:
        """fptqQuantizeActivation: codes [m, padded k], scales [m], row sums [m]."""
        m, k = x.shape
        mode = PER_TOKEN if static_scale is None else STATIC
        desc = Desc(m, 8, k, 0, PER_CHANNEL, mode, OUTPUT_TYPES.index(x.dtype.type), 0)
        self.memory.reset()
        inputs = [self.memory.upload(array) for array in (x, np.array([static_scale or 0.0], dtype=np.float32))]
        results: tuple[NDArray[Any], ...] = (
            np.full((m, padded(k, 64)), 99, dtype=np.int8),
            np.full(m, np.nan, dtype=np.float32),
            np.full(m, 99, dtype=np.int32),
        )
        outputs = [self.memory.upload(array, writable=True) for array in results]
        pointers = [ctypes.c_void_p(buffer.pointer) for buffer in (*inputs, *outputs)]
        stream = ctypes.c_void_p(self.memory.stream())
        self.boundary.check(self.boundary.call("fptqQuantizeActivation", desc, *pointers, stream))
        codes, scales, sums = (
            buffer.download().view(array.dtype).reshape(array.shape)
            for buffer, array in zip(outputs, results, strict=True)
        )
        return codes, scales, sums


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), dtype=np.uint8).copy()
