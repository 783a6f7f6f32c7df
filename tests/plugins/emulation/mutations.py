"""Bugs that somebody could write into the kernels, each as one edit of one source file."""

from __future__ import annotations

from dataclasses import dataclass

GEMM = "w4a8_gemm.cuh"
GEMV = "w4a8_gemv.cuh"
SHAPES = "gemm_shapes.cuh"
REDUCE = "split_k_reduce.cuh"
PAIRS = "scale_pairs.cuh"
SCHEME = "scheme.cuh"
ROW = "quantize_row.cuh"


@dataclass(frozen=True)
class Mutation:
    """Replace `old` by `new` everywhere in `file`; `name` says what is then wrong."""

    name: str
    file: str
    old: str
    new: str


MUTATIONS = (
    # pipeline and synchronization
    Mutation("waits for one group too few", GEMM, "cp_async_wait<kNumStages - 2>", "cp_async_wait<kNumStages - 1>"),
    Mutation("no barrier in the main loop", GEMM, "sync_block(); ", ""),
    Mutation("commits only when it fetched", GEMM, "      cp_async_commit();\n      multiply", "      multiply"),
    Mutation(
        "refills the stage being read",
        GEMM,
        "fetch_tile(u + kNumStages - 1, u)",
        "fetch_tile(u + kNumStages, u)",
    ),
    Mutation("pointers into A stay in the first round", GEMM, "gmem_a[i] += tiles * T::BLOCK_K", "(void)i"),
    Mutation("pointers into B advance one tile short", GEMM, "+= tiles * FPTQ", "+= (tiles - 1) * FPTQ"),
    Mutation("a round is one tile too long", GEMM, "if (u >= left) break", "if (u > left) break"),
    Mutation("pointers stay where the pipeline was filled from", GEMM, "advance(kNumStages - 1);", ""),
    Mutation("fetches one tile past the end at the start", GEMM, "if (t < num_tiles)", "if (t <= num_tiles)"),
    Mutation(
        "fetches one tile past the end in the loop",
        GEMM,
        "if (u + kNumStages - 1 < left",
        "if (u + kNumStages - 2 < left",
    ),
    Mutation("no barrier in block_reduce", ROW, "  sync_block();\n  value = lane", "  value = lane"),
    Mutation(
        "both reductions share their scratch",
        ROW,
        "reinterpret_cast<int*>(scratch) + kMaxWarps",
        "reinterpret_cast<int*>(scratch)",
    ),
    Mutation("no barrier after quantizing (GEMV)", GEMV, "  sync_block();\n\n  /* INT32:", "  /* INT32:"),
    Mutation(
        "no barrier before adding the warps (GEMV)",
        GEMV,
        "  sync_block();\n\n  constexpr int kPairs",
        "  constexpr int kPairs",
    ),
    Mutation(
        "only half the lanes shuffle (GEMV)",
        GEMV,
        "sum += shuffle_xor(sum, 2);",
        "if (lane < 16) sum += shuffle_xor(sum, 2);",
    ),
    # layouts
    Mutation("writes A with another swizzle", GEMM, "chunk_row / 2 % 4", "chunk_row % 4"),
    Mutation("reads A with another swizzle", GEMM, "read_swizzle_a = lane / 2 % 4", "read_swizzle_a = lane % 4"),
    Mutation("nibbles swapped", SCHEME, "return word & 0xF0F0F0F0u;", "return (word << kCodeShift) & 0xF0F0F0F0u;"),
    Mutation("two_level nibbles swapped", SCHEME, "((word >> 4) & 0x0F0F0F0Fu)", "(word & 0x0F0F0F0Fu)"),
    Mutation("the two steps of a tile swapped", GEMM, "step == 0 ? b[j / 2]", "step == 1 ? b[j / 2]"),
    Mutation("the two halves of a packed tile swapped", GEMM, "(j % 2 == 0)", "(j % 2 == 1)"),
    Mutation("GEMV quarters in another order", GEMV, "words[quarter / 2][half]", "words[1 - quarter / 2][half]"),
    Mutation("GEMV codes stored in plain order", GEMV, "(word % 4 * 4 + word / 4) * 4", "(word % 16) * 4"),
    # groups and scales
    Mutation(
        "group starts in the wrong phase",
        GEMM,
        "(step == 0 && phase == 0)",
        "(step == 0 && phase == S::kTilesPerGroup - 1)",
    ),
    Mutation(
        "group ends in the wrong phase",
        GEMM,
        "(step == 1 && phase == S::kTilesPerGroup - 1)",
        "(step == 1 && phase == 0)",
    ),
    Mutation(
        "scales of the first group of the tile only",
        GEMM,
        "(group_row * T::BLOCK_N + column)",
        "(0 * group_row * T::BLOCK_N + column)",
    ),
    Mutation("scales of neighbouring channels swapped", GEMM, "q % 2 == 0 ? scale0", "q % 2 == 1 ? scale0"),
    Mutation("scale rows do not advance", GEMM, "gmem_s += s_step", "gmem_s += 0 * s_step"),
    Mutation("split-K starts at the first scales", GEMM, "s_group = first_tile / S::kTilesPerGroup", "s_group = 0"),
    Mutation(
        "two_level: one pair for two groups of 16",
        GEMM,
        "pairs.scale(group_row + 1, j)",
        "pairs.scale(group_row, j)",
    ),
    Mutation("two_level: pairs of the first group of the tile only", GEMM, "scale(group_row, j)", "scale(0, j)"),
    Mutation("two_level: pairs loaded as they lie", PAIRS, "ldmatrix_x4_trans", "ldmatrix_x4"),
    Mutation("two_level: pairs of the neighbouring fragment", PAIRS, "number % 2 == 0", "number % 2 == 1"),
    Mutation("two_level: pairs of another register", PAIRS, "% kPairsPerLoad / 2]", "% kPairsPerLoad / 2 ^ 1]"),
    Mutation("two_level: every warp reads the first channels", PAIRS, "+ first_channel", "+ 0 * first_channel"),
    Mutation("two_level: the second load repeats the first", PAIRS, "smem_lane + i *", "smem_lane + 0 * i *"),
    Mutation("two_level: factor for offset", SCHEME, "replicate_byte<2 * kHalf + 1>", "replicate_byte<2 * kHalf>"),
    Mutation("two_level: pairs of the low half only", SCHEME, "extract_byte<2 * kHalf>", "extract_byte<0>"),
    Mutation("two_level: offset not taken out", SCHEME, "sum - kTwoLevelOffset * x.row_sum", "sum"),
    Mutation("magic float off by one", SCHEME, "12582912.0f", "12582913.0f"),
    Mutation("magic integer off by one", SCHEME, "kMagicBits = 0x4B400000", "kMagicBits = 0x4B400001"),
    Mutation("factor 16 left in", SCHEME, "1.0f / 16.0f", "1.0f"),
    Mutation("GEMV sums of a group not cleared", GEMV, "          sums[half][row] = kFirstSum;\n", ""),
    Mutation("GEMV upper channels use the lower scales", GEMV, "(p.s + index + 8)", "(p.s + index)"),
    Mutation("GEMV scales of one group for the whole tile", GEMV, "S::kGroupsPerTile + g;", "S::kGroupsPerTile;"),
    # split-K
    Mutation(
        "partial sums added backwards", REDUCE, "partial + split * stride", "partial + (p.split_k - 1 - split) * stride"
    ),
    Mutation("the first part added every time", REDUCE, "partial + split * stride", "partial + 0 * split * stride"),
    Mutation("split-K ignores where its A starts", GEMM, " + first_tile * T::BLOCK_K", ""),
    Mutation("split-K ignores where its B starts", GEMM, "p.num_k_tiles + first_tile)", "p.num_k_tiles)"),
    Mutation(
        "split-K cuts a group in two",
        SHAPES,
        "split / split_k * S::kTilesPerGroup",
        "split * S::kTilesPerGroup / split_k",
    ),
    Mutation(
        "GEMV forgets the last round of tiles",
        GEMV,
        "(num_units - warp + kGemvWarps - 1) / kGemvWarps",
        "(num_units - warp) / kGemvWarps",
    ),
    # edges
    Mutation("reads rows past m", GEMM, "valid_a[i] = row < p.m", "valid_a[i] = true"),
    Mutation("reads channels past n", GEMM, "valid_b[i] = n_tile * FPTQ_TILE_N < p.padded_n", "valid_b[i] = true"),
    Mutation("reads groups past k", GEMM, "offset < tiles_left_s", "offset <= tiles_left_s"),
    Mutation("reads scales past n", GEMM, "(s_column < p.padded_n ? s_column : 0)", "s_column"),
    Mutation("stores one row too many", GEMM, "if (row >= p.m) continue", "if (row > p.m) continue"),
    Mutation("stores channels past n", GEMM, "if (column >= p.out.n) continue;", ""),
    Mutation("split-K reduces channels past n", REDUCE, "if (column >= p.out.n) return;", ""),
    Mutation("short panels miscount their height", SHAPES, "within / height", "within / kPanelM"),
    Mutation("GEMV loads one tile past its last", GEMV, "i + kGemvDepth < my_tiles", "i + kGemvDepth <= my_tiles"),
    Mutation("GEMV stores channels past n", GEMV, " || column >= p.out.n", ""),
    # quantization and results
    Mutation("clips at -127", "bounds.h", "kMinCode = -128.0f", "kMinCode = -127.0f"),
    Mutation("no smallest scale", ROW, "absmax < kPerTokenEps ? kPerTokenEps : absmax", "absmax"),
    Mutation("absmax keeps the sign", ROW, "& 0x7FFFFFFFu", "& 0xFFFFFFFFu"),
    Mutation(
        "vectors past the cached ones skipped",
        ROW,
        "vector = thread_id() + kCachedVectors * num",
        "vector = thread_id() + 5 * num",
    ),
    Mutation("row sums of every second word", ROW, "sum += code;", "if (i < 4) sum += code;"),
    Mutation("the bias is forgotten", SCHEME, "fma_rn(value, x_scale, bias)", "fma_rn(value, x_scale, 0.0f * bias)"),
)

# Wrong in speed only: results stay right, and the counters of bank conflicts must show it.
PLAIN_ROWS_OF_A = (
    Mutation("A is not swizzled", GEMM, "(chunk_column ^ (chunk_row / 2 % 4))", "chunk_column"),
    Mutation("A is not swizzled", GEMM, "(chunk ^ read_swizzle_a)", "(chunk ^ 0 * read_swizzle_a)"),
)
