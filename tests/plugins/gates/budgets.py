"""Most non-MMA instructions that the main loop may spend for each tensor-core instruction, and why.

A scheduler keeps the tensor cores busy while it issues at most `clocks of an IMMA - 1` others for each: 7 on 8.0, 15 on
8.6 to 8.9 and 12.x (fptq_export/roofline/devices.py). NOPs are not counted: on 12.x ptxas puts one between two
tensor-core instructions where it has nothing else to issue, so they fill slots that nothing wants.

Tiles with 64 rows a warp are the ones for long prompts, where the tensor cores are the bound. Each has a number, the
same on every architecture and for every such tile; a scheme without a number has no such tile. The others have what
the work takes. For each tensor-core instruction:

    conversion   c * 16 / warp_m: c is 3 (a shift, two masks), two_level 5 (and two multiply-adds)
    pairs        two_level: (2 + 1 / 8) * 16 / warp_m * pairs; factor, offset, a share of ldmatrix; 32 / group pairs,
                 at most 2
    folds        group: (8 + 4 + 3 * 16 / warp_m) * 32 / group; a subtraction and a multiply-add for each of 4 sums; on
                 8.x ptxas may write the four magic words anew; a load and two conversions for the scales
    operands     8 / warp_n + 8 / warp_m: ldmatrix of A, 16-byte loads of B
    each k tile  _PER_TILE, shared by its tensor-core instructions

Smaller warp tiles serve M <= 64, where memory is the bound: the 128 bytes of weights of a tensor-core instruction take
38 clocks to reach a 16-row tile on A100 (3.35 bytes a clock and scheduler), 19 clocks for a 32-row tile.
"""

from __future__ import annotations

from tests.plugins.gates.kernels import GemmKernel

__all__ = ["budget"]

_LARGE_WARP_M = 64
_LARGE_BUDGETS = {
    ("per_channel", 0): 2.2,
    ("group", 128): 5.2,
    ("group", 64): 8.8,
    ("group", 32): 13.9,
    ("two_level", 128): 3.0,
    ("two_level", 64): 3.0,
    ("two_level", 32): 3.0,
    ("two_level", 16): 3.0,
}
"""What keeps folding and conversion behind the tensor cores of 8.0; folds of groups of 64 and 32 exceed its 7, and are
behind those of 8.6 to 8.9 and 12.x."""
_PER_TILE = 40.0
"""Instructions of a warp for each k tile whatever its size: 3 to 6 LDGSTS, on 8.x 3 dummy loads that keep LDGSTS behind
earlier loads, up to 12 for pointers and predicates of scales, 3 to wait, up to 7 of loop control, and addresses that
the compiler computes again rather than keep. Measured (nvcc 13.0.88): at most 39."""


def budget(kernel: GemmKernel) -> float:
    """Non-MMA instructions, without NOP, for each IMMA of the main loop."""
    if kernel.warp_m >= _LARGE_WARP_M:
        return _LARGE_BUDGETS[kernel.scheme, kernel.group_size]
    return _of_small_tile(kernel)


def _of_small_tile(kernel: GemmKernel) -> float:
    """The sum of the module's docstring."""
    fragments_m, fragments_n = kernel.warp_m // 16, kernel.warp_n // 8
    half = 2 if kernel.folds and kernel.group_size == 16 else 1
    conversion = (5.0 if kernel.scheme == "two_level" else 3.0) / fragments_m
    pairs = min(32 / kernel.group_size, 2.0) if kernel.scheme == "two_level" else 0.0
    folds = (12.0 + 3.0 / fragments_m) * 32 / kernel.group_size if kernel.folds else 0.0
    operands = 1.0 / fragments_n + 0.5 / fragments_m
    per_tile = _PER_TILE / (2 * fragments_m * fragments_n)
    return (conversion + 2.125 * pairs / fragments_m + folds + operands + per_tile) / half
