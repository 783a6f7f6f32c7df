/* The tiles that w4a8_gemm is compiled for: one list for the kernels and for the code that chooses among
 * them. */
#ifndef FPTQ_SRC_GEMM_TILES_H
#define FPTQ_SRC_GEMM_TILES_H

#include "fptq/kernels.h"

/*
 * FPTQ_GEMM_TILE(block_m, block_n, warp_m, warp_n, stages). A k tile is 64 everywhere: two tensor-core steps,
 * one packed tile.
 *   16, 32 rows: decode batches; bound by memory, so deep pipelines and few rows wasted.
 *   64 rows: prompts of moderate length, and long ones where groups are folded (sums in INT32 and FP32
 *   fill the registers). 64 channels: matrices too small to fill a device with larger tiles.
 *   128 rows: long prompts. A warp tile of 64 x 64 reads shared memory least, and has no room for FP32 sums.
 */
#ifndef FPTQ_GEMM_TILES /* a build may compile fewer, for speed or size */
#define FPTQ_GEMM_TILES(FPTQ_GEMM_TILE) \
  FPTQ_GEMM_TILE(16, 128, 16, 32, 6)    \
  FPTQ_GEMM_TILE(32, 128, 32, 32, 4)    \
  FPTQ_GEMM_TILE(64, 64, 32, 32, 4)     \
  FPTQ_GEMM_TILE(64, 128, 64, 32, 4)    \
  FPTQ_GEMM_TILE(128, 128, 64, 32, 4)   \
  FPTQ_GEMM_TILE(128, 128, 64, 64, 4)
#endif

/* FPTQ_SCHEME(kind, group size) */
#ifndef FPTQ_SCHEMES
#define FPTQ_SCHEMES(FPTQ_SCHEME)  \
  FPTQ_SCHEME(FPTQ_PER_CHANNEL, 0) \
  FPTQ_SCHEME(FPTQ_GROUP, 128)     \
  FPTQ_SCHEME(FPTQ_GROUP, 64)      \
  FPTQ_SCHEME(FPTQ_GROUP, 32)      \
  FPTQ_SCHEME(FPTQ_GROUP, 16)      \
  FPTQ_SCHEME(FPTQ_TWO_LEVEL, 128) \
  FPTQ_SCHEME(FPTQ_TWO_LEVEL, 64)  \
  FPTQ_SCHEME(FPTQ_TWO_LEVEL, 32)  \
  FPTQ_SCHEME(FPTQ_TWO_LEVEL, 16)
#endif

namespace fptq {

/* The GEMV: most rows; warps of a block (256 threads: enough loads under way, few partial sums to add); k
 * tiles of a warp that are under way (4 x 512 bytes). */
inline constexpr int kGemvMaxRows = 4;
inline constexpr int kGemvWarps = 8;
inline constexpr int kGemvDepth = 4;

/*
 * Folding keeps an INT32 and an FP32 sum an element: 64 + 64 registers a thread for a warp tile of 64 x 32.
 * Groups of 16 end four times a k tile, and the compiler, which moves the folds apart, runs out of registers
 * at that size.
 */
constexpr bool tile_fits_registers(int warp_m, int warp_n, bool folds, int group_size) {
  return !folds || warp_m * warp_n <= (group_size == 16 ? 32 * 32 : 64 * 32);
}

/*
 * two_level promises the tiles for long prompts at most 3 instructions beside each tensor-core step
 * (tests/plugins/gates). Conversion takes 1.25 of them in a warp tile of 64 rows, and two for each scale pair
 * of groups of 16 another 1.0. What is left pays for copies, waits and the loop in a warp tile of 64 x 64, not
 * in one of 64 x 32, which shares them among half the steps.
 */
constexpr bool tile_keeps_pace(int warp_m, int warp_n, bool two_level, int group_size) {
  return !two_level || group_size > 16 || warp_m < 64 || warp_n >= 64;
}

constexpr bool tile_is_offered(int warp_m, int warp_n, FptqScheme scheme, int group_size) {
  return tile_fits_registers(warp_m, warp_n, scheme == FPTQ_GROUP, group_size) &&
         tile_keeps_pace(warp_m, warp_n, scheme == FPTQ_TWO_LEVEL, group_size);
}

}  // namespace fptq

#endif  // FPTQ_SRC_GEMM_TILES_H
