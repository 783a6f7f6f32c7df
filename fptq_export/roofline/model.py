"""Modelled time of a W4A8 linear, and lower bounds for FP16 and W8A8.

The slowest of three units decides, then launches are added:

    memory   bytes moved / bandwidth
    mma      tensor-core instructions of the busiest multiprocessor * clocks of one
    issue    all instructions of the main loop of the busiest multiprocessor / 4 schedulers

Left out: imperfect overlap of the three, latency of short pipelines, L2 and shared-memory bandwidth, lower clocks.
So the model is an upper bound of speed, and tells what bounds a shape. The GEMM runs the tile and split of K that the
model finds fastest, as `fptqChooseConfig` does with its own, finer model (plugins/src/config.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fptq_export.roofline.devices import LAUNCH_S, SCHEDULERS, Device
from fptq_export.roofline.instructions import Scheme, Tile, gemm_others, gemv_per_tile, tiles

__all__ = ["Breakdown", "Shape", "bound_s", "time_s", "weight_bytes_of"]

TILE_N, TILE_K = 16, 64
"""A packed tile of weights (plugins/include/fptq/layout.h)."""
GEMV_MAX_ROWS = 4
"""kGemvMaxRows of plugins/src/gemm_tiles.h."""
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
MIN_TILES_PER_SPLIT = 4
"""kSplits and kMinTilesPerSplit of plugins/src/config.cpp."""
QUANTIZE_INSTRUCTIONS = 20.0
"""Of a lane for one element of x, in the GEMV, where every block quantizes its rows. Estimated, as in
plugins/src/modelled_time.cpp."""


@dataclass(frozen=True)
class Shape:
    """A linear: n output channels, k input channels."""

    n: int
    k: int


@dataclass(frozen=True)
class Breakdown:
    """Seconds that each unit needs; all but `launch` overlap."""

    memory: float
    mma: float
    issue: float
    launch: float
    kernel: str
    """What runs, as `gemm 128x128, warp 64x32, split 2`."""

    @property
    def total(self) -> float:
        """Modelled time in seconds."""
        return max(self.memory, self.mma, self.issue) + self.launch

    @property
    def bound(self) -> str:
        """The unit that decides."""
        return max(("memory", "mma", "issue"), key=lambda unit: float(getattr(self, unit)))


def time_s(shape: Shape, scheme: Scheme, m: int, device: Device) -> Breakdown:
    """Modelled time for m rows, with the fastest kernel that exists.

    Raises:
        ValueError: m is below 1, or K is not a multiple of the group size.
        KeyError: No kernel is compiled for the scheme or the architecture.
    """
    if m < 1 or (scheme.group_size and shape.k % scheme.group_size):
        raise ValueError(f"m = {m}, k = {shape.k} do not fit group size {scheme.group_size}")
    choices = list(_gemm_times(shape, scheme, m, device))
    if m <= GEMV_MAX_ROWS:
        choices.append(_gemv_time(shape, scheme, m, device))
    return min(choices, key=lambda choice: choice.total)


def bound_s(
    shape: Shape, m: int, device: Device, *, weight_bytes: float, activation_bytes: float, output_bytes: float = 2.0
) -> float:
    """Least time in seconds for so many bytes an element: memory or tensor cores, one launch.

    Weights and activations: FP16 is 2 and 2, W8A8 is 1 and 1, the roofline of W4A8 is `weight_bytes_of(scheme)` and 1.
    Activations of one byte multiply at the INT8 rate, all others at the FP16 rate.
    """
    moved = shape.n * shape.k * weight_bytes + m * (shape.k * activation_bytes + output_bytes * shape.n)
    rate = device.int8_ops_per_s if activation_bytes == 1 else device.fp16_ops_per_s
    return max(moved / device.bytes_per_s, 2.0 * m * shape.n * shape.k / rate) + LAUNCH_S


def weight_bytes_of(scheme: Scheme, k: int) -> float:
    """Bytes a weight with its scales: 16 bits a group, or a channel, and 4 bytes a channel more for two_level."""
    per_group = 2.0 / (scheme.group_size or k)
    return 0.5 + per_group + (4.0 / k if scheme.name == "two_level" else 0.0)


def _gemv_time(shape: Shape, scheme: Scheme, m: int, device: Device) -> Breakdown:
    blocks = math.ceil(shape.n / TILE_N)
    per_tile = gemv_per_tile(device.architecture, m, scheme)
    instructions = math.ceil(shape.k / TILE_K) * per_tile + QUANTIZE_INSTRUCTIONS * m * shape.k / 32
    issue = math.ceil(blocks / device.multiprocessors) * instructions / SCHEDULERS / device.clock_hz
    moved = shape.n * shape.k * weight_bytes_of(scheme, shape.k) + 2.0 * m * (shape.k + shape.n)
    return Breakdown(moved / device.bytes_per_s, 0.0, issue, LAUNCH_S, f"gemv {m}")


def _gemm_times(shape: Shape, scheme: Scheme, m: int, device: Device) -> Iterator[Breakdown]:
    k_tiles = math.ceil(shape.k / TILE_K)
    for tile in tiles(device.architecture, scheme):
        for split in SPLITS:
            if split == 1 or k_tiles // split >= MIN_TILES_PER_SPLIT:
                yield _gemm_time(shape, scheme, m, device, tile, split)


def _gemm_time(shape: Shape, scheme: Scheme, m: int, device: Device, tile: Tile, split: int) -> Breakdown:
    blocks = math.ceil(m / tile.block_m) * math.ceil(shape.n / tile.block_n) * split
    k_tiles = math.ceil(math.ceil(shape.k / TILE_K) / split)
    # Groups of 16 use two half-length instructions: half the clocks each, but a whole issue slot.
    halves = 2 if scheme.name == "group" and scheme.group_size == 16 else 1
    imma = k_tiles * 2 * (tile.block_m // 16) * (tile.block_n // 8) / SCHEDULERS
    busiest = math.ceil(blocks / device.multiprocessors) * imma
    others = gemm_others(device.architecture, tile, scheme)
    # x is read as FP16 and written as INT8 by quantize_activation, then read by the GEMM.
    moved = shape.n * shape.k * weight_bytes_of(scheme, shape.k) + m * (4.0 * shape.k + 2.0 * shape.n)
    if split > 1:
        moved += 8.0 * m * shape.n * split  # partial sums, written and read
    return Breakdown(
        memory=moved / device.bytes_per_s,
        mma=busiest * device.imma_clocks / device.clock_hz,
        issue=busiest * halves * (1.0 + others) / device.clock_hz,
        launch=LAUNCH_S * (3 if split > 1 else 2),
        kernel=f"gemm {tile.block_m}x{tile.block_n}, warp {tile.warp_m}x{tile.warp_n}, split {split}",
    )
