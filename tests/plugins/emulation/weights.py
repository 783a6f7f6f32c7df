"""Quantized weights for tests: integers, real scales, and the bytes that kernels read.

Nothing here shares code with the packers of the product: the layouts of fptq/layout.h are written down again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

PER_CHANNEL, GROUP, TWO_LEVEL = range(3)


@dataclass
class Weight:
    """A quantized weight in the three forms tests need: integers, real scales, and the bytes of the kernel."""

    values: NDArray[np.int64]  # [n, k]; two_level: s1 * u - z, the INT8 weight
    scales: NDArray[np.float64]  # [n, groups]; two_level: [n, 1]
    group_size: int  # that of `scales`
    scheme: int
    kernel_group: int
    codes: NDArray[np.uint8] = field(repr=False)
    scale_bytes: NDArray[Any] = field(repr=False)
    channel_scales: NDArray[np.float32] | None = None


def padded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def packed_tiles(nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Nibbles [n, k] in the tile order of layout.h, as bytes."""
    n, k = nibbles.shape
    full = np.zeros((padded(n, 16), padded(k, 64)), dtype=np.uint8)
    full[:n, :k] = nibbles
    # n = 16 nt + 8 nh + row;  k = 64 kt + 32 kh + 16 high + 4 quad + byte
    tiles = full.reshape(full.shape[0] // 16, 2, 8, full.shape[1] // 64, 2, 2, 4, 4)
    ordered = tiles.transpose(0, 3, 2, 6, 1, 4, 7, 5)  # nt kt row quad nh kh byte high
    return np.ascontiguousarray(ordered[..., 0] | (ordered[..., 1] << 4)).reshape(-1)


def group_major(scales: NDArray[Any], n: int) -> NDArray[Any]:
    """[n, groups, ...] -> [groups, padded n, ...], padding zero."""
    result = np.zeros((scales.shape[1], padded(n, 16), *scales.shape[2:]), dtype=scales.dtype)
    result[:, :n] = np.moveaxis(scales, 0, 1)
    return np.ascontiguousarray(result)


def plain_weight(codes: NDArray[np.integer], scales: NDArray[np.float16], group_size: int) -> Weight:
    """INT4 codes [n, k] with FP16 scales [n, groups]; group_size 0 is per channel."""
    n, k = codes.shape
    return Weight(
        values=codes.astype(np.int64),
        scales=scales.astype(np.float64),
        group_size=group_size or k,
        scheme=GROUP if group_size else PER_CHANNEL,
        kernel_group=group_size,
        codes=packed_tiles((codes.astype(np.int64) & 15).astype(np.uint8)),
        scale_bytes=group_major(scales, n),
    )


def two_level_weight(
    unsigned: NDArray[np.integer],
    s1: NDArray[np.integer],
    z: NDArray[np.integer],
    scales: NDArray[np.float32],
    group_size: int,
) -> Weight:
    """Codes u [n, k] in 0..15, integer scales s1 and offsets z [n, groups], FP32 channel scales [n]."""
    n, k = unsigned.shape
    pairs = np.stack([s1, 128 - z], axis=-1)
    assert pairs.min() >= 0
    assert (15 * pairs[..., 0] + pairs[..., 1]).max() <= 255
    values = unsigned.astype(np.int64) * np.repeat(s1, group_size, axis=1) - np.repeat(z, group_size, axis=1)
    channel = np.zeros(padded(n, 16), dtype=np.float32)
    channel[:n] = scales
    return Weight(
        values=values,
        scales=scales.astype(np.float64)[:, None],
        group_size=k,
        scheme=TWO_LEVEL,
        kernel_group=group_size,
        codes=packed_tiles(unsigned.astype(np.uint8)),
        scale_bytes=group_major(pairs.astype(np.uint8), n),
        channel_scales=channel,
    )


def random_weight(rng: np.random.Generator, n: int, k: int, scheme: int, group_size: int) -> Weight:
    """Weights of ordinary size; group scales of both signs."""
    if scheme == TWO_LEVEL:
        groups = (n, k // group_size)
        s1 = rng.integers(1, 17, groups)
        z = np.clip(rng.integers(0, 120, groups), 15 * s1 - 119, 119)
        return two_level_weight(
            rng.integers(0, 16, (n, k)), s1, z, rng.uniform(1e-4, 1e-3, n).astype(np.float32), group_size
        )
    scales = rng.uniform(0.002, 0.02, (n, k // (group_size or k))) * rng.choice(
        [-1.0, 1.0], (n, k // (group_size or k))
    )
    return plain_weight(rng.integers(-8, 8, (n, k)), scales.astype(np.float16), group_size)
