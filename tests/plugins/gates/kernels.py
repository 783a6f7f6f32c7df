"""Which kernels there are, read from the names in the machine code, and what each is expected to take."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["SCHEME_NAMES", "GemmKernel", "GemvKernel", "gemm_from_name", "gemv_from_name"]

SCHEME_NAMES = ("per_channel", "group", "two_level")
"""By the value of FptqScheme."""
_SCHEME = r"6SchemeIL10FptqScheme(\d)ELi(\d+)E"
_GEMM = re.compile(r"w4a8_gemm_kernelINS_8GemmTileI" + r"Li(\d+)E" * 5 + rf"EENS_{_SCHEME}")
_GEMV = re.compile(rf"w4a8_gemv_kernelILi(\d)ENS_{_SCHEME}")
_TILE_K = 64
_TILE_N = 16
_REGISTERS = 65536
"""Of a multiprocessor, on every architecture from 8.0 on (CUDA C++ Programming Guide, technical specifications)."""


@dataclass(frozen=True)
class GemmKernel:
    """One instantiation of w4a8_gemm_kernel."""

    block_m: int
    block_n: int
    warp_m: int
    warp_n: int
    stages: int
    scheme: str
    group_size: int
    """0: per channel."""

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}, warp {self.warp_m}x{self.warp_n}"
        return f"gemm {tile}, {self.scheme} {self.group_size or ''}".rstrip()

    @property
    def folds(self) -> bool:
        """Whether INT32 sums of groups are added up in FP32."""
        return self.scheme == "group"

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * (self.block_m // self.warp_m) * (self.block_n // self.warp_n)

    @property
    def imma(self) -> int:
        """Tensor-core instructions of a round of `stages` k tiles. Groups of 16 need the half-length one: twice."""
        steps = _TILE_K // (16 if self.folds and self.group_size == 16 else 32)
        return self.stages * steps * (self.warp_m // 16) * (self.warp_n // 8)

    @property
    def async_copies(self) -> int:
        """LDGSTS of a round: each thread copies 16 bytes of A and B, and of the scales once a group or k tile."""
        chunks_a = self.block_m * _TILE_K // 16
        chunks_b = self.block_n * _TILE_K // 2 // 16
        scale_rounds = 0 if self.group_size == 0 else self.stages * _TILE_K // max(self.group_size, _TILE_K)
        return self.stages * (-(-chunks_a // self.threads) + chunks_b // self.threads) + scale_rounds

    @property
    def registers(self) -> int:
        """Most that the occupancy plan allows for: `registers_of` in plugins/src/modelled_time.cpp."""
        sums = self.warp_m * self.warp_n // 32
        folding = sums if self.folds else 0
        if self.folds and self.group_size < _TILE_K:
            folding += 2 * sums if self.group_size == 16 else sums // 4
        return min(255, 64 + sums + folding + self.warp_m // 2)


@dataclass(frozen=True)
class GemvKernel:
    """One instantiation of w4a8_gemv_kernel."""

    rows: int
    scheme: str
    group_size: int

    WARPS = 8
    """kGemvWarps."""
    DEPTH = 4
    """kGemvDepth: k tiles of a round."""
    MIN_BLOCKS = 2
    """kGemvMinBlocks."""

    def __str__(self) -> str:
        return f"gemv {self.rows} rows, {self.scheme} {self.group_size or ''}".rstrip()

    @property
    def dot_products(self) -> int:
        """dp4a of a round, for each lane: 16 channels x 64 input channels, 4 at a time, over 32 lanes, for each row."""
        return self.DEPTH * self.rows * _TILE_N * _TILE_K // 4 // 32

    @property
    def registers(self) -> int:
        """What the launch bounds leave."""
        return _REGISTERS // (self.WARPS * 32 * self.MIN_BLOCKS)


def gemm_from_name(mangled: str) -> GemmKernel | None:
    """The GEMM kernel of a mangled name; None for any other function."""
    if not (found := _GEMM.search(mangled)):
        return None
    *tile, scheme, group = map(int, found.groups())
    block_m, block_n, warp_m, warp_n, stages = tile
    return GemmKernel(block_m, block_n, warp_m, warp_n, stages, SCHEME_NAMES[scheme], group)


def gemv_from_name(mangled: str) -> GemvKernel | None:
    """The GEMV kernel of a mangled name; None for any other function."""
    if not (found := _GEMV.search(mangled)):
        return None
    rows, scheme, group = map(int, found.groups())
    return GemvKernel(rows, SCHEME_NAMES[scheme], group)
