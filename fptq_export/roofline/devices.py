"""What a GPU can do, each number with its source. Boost clocks and peak rates: a real device does less for long."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEVICES", "LAUNCH_S", "OPERATIONS_PER_IMMA", "SCHEDULERS", "Device"]

OPERATIONS_PER_IMMA = 2 * 16 * 8 * 32
"""Multiplications and additions of one mma.m16n8k32."""
SCHEDULERS = 4
"""Of a multiprocessor, each with a tensor core and one instruction a clock (CUDA C++ Programming Guide, 8.x to 12)."""
LAUNCH_S = 2.5e-6
"""From the end of a kernel to the start of the next one in a stream. Assumed, as in plugins/src/modelled_time.cpp; a
CUDA graph needs less."""


@dataclass(frozen=True)
class Device:
    """A GPU; rates are dense, without sparsity."""

    name: str
    architecture: str
    """Compute capability without the dot."""
    multiprocessors: int
    clock_hz: float
    bytes_per_s: float
    int8_ops_per_s: float
    """Of the data sheet."""
    mma_sync_share: float = 1.0
    """Part of the data sheet's rate that mma.sync reaches."""

    @property
    def fp16_ops_per_s(self) -> float:
        """Half the INT8 rate, on all of them."""
        return self.int8_ops_per_s / 2

    @property
    def imma_clocks(self) -> float:
        """Clocks that an mma.m16n8k32 occupies the tensor core of a scheduler."""
        per_clock = self.int8_ops_per_s * self.mma_sync_share / (self.multiprocessors * SCHEDULERS * self.clock_hz)
        return OPERATIONS_PER_IMMA / per_clock


DEVICES = (
    # NVIDIA A100 data sheet, 80 GB SXM: 2039 GB/s, 624 TOPS; architecture white paper: 108 multiprocessors, 1410 MHz
    Device("A100", "80", 108, 1.41e9, 2.039e12, 624e12),
    # NVIDIA L40S data sheet: 864 GB/s, 733 TOPS; Ada white paper: 142 multiprocessors, 2520 MHz
    Device("L40S", "89", 142, 2.52e9, 0.864e12, 733e12),
    # NVIDIA Ada white paper, RTX 4090: 1008 GB/s, 660.6 TOPS, 128 multiprocessors, 2520 MHz
    Device("RTX 4090", "89", 128, 2.52e9, 1.008e12, 660.6e12),
    # NVIDIA H100 data sheet, SXM: 3.35 TB/s, 1979 TOPS; Hopper white paper: 132 multiprocessors; 1830 MHz gives
    # that rate. It is of wgmma; mma.sync reaches about 62 % of it (recalled, not measured; as in modelled_time.cpp).
    Device("H100", "90", 132, 1.83e9, 3.35e12, 1979e12, 0.62),
)
