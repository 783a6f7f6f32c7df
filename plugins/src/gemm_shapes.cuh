/* The GEMM before it runs: shapes known at compile time, what a launch is given, and which part is whose. */
#ifndef FPTQ_SRC_GEMM_SHAPES_CUH
#define FPTQ_SRC_GEMM_SHAPES_CUH

#include "gemm_tiles.h"
#include "scheme.cuh"

namespace fptq {

/* ---- shapes known at compile time ---- */

template <int kBlockM, int kBlockN, int kWarpM, int kWarpN, int kStages>
struct GemmTile {
  static constexpr int BLOCK_M = kBlockM;
  static constexpr int BLOCK_N = kBlockN;
  static constexpr int BLOCK_K = FPTQ_TILE_K;
  static constexpr int WARP_M = kWarpM;
  static constexpr int WARP_N = kWarpN;
  static constexpr int kNumStages = kStages;
  static constexpr int kWarpsM = BLOCK_M / WARP_M;
  static constexpr int kNumThreads = 32 * kWarpsM * (BLOCK_N / WARP_N);
  /* Resident blocks that the compiler must leave registers for. Left to itself it aims higher, and spills for
   * it. */
  static constexpr int kMinBlocks = kNumThreads <= 128 ? 2 : 1;
  static constexpr int kFragmentsM = WARP_M / 16; /* accumulator fragments of a warp, 16 x 8 each */
  static constexpr int kFragmentsN = WARP_N / 8;

  static constexpr int kChunksPerRowA = BLOCK_K / 16; /* a chunk is the 16 bytes of a cp.async */
  static constexpr int kChunksA = BLOCK_M * kChunksPerRowA;
  static constexpr int kChunksB = BLOCK_N / FPTQ_TILE_N * 32;
  static constexpr int kCopiesA =
      (kChunksA + kNumThreads - 1) / kNumThreads; /* of a thread, for one k tile */
  static constexpr int kCopiesB = kChunksB / kNumThreads;
  static constexpr int kRowsPerCopyA = kNumThreads / kChunksPerRowA;
  static constexpr int kStageBytesA = BLOCK_M * BLOCK_K;
  static constexpr int kStageBytesB = BLOCK_N * BLOCK_K / 2;

  static_assert(BLOCK_M % WARP_M == 0 && BLOCK_N % WARP_N == 0, "warps must tile the block");
  static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0,
                "a warp reads whole fragments of A and whole packed tiles of B");
  static_assert(kChunksB % kNumThreads == 0, "every thread copies the same number of weight chunks");
  static_assert(kChunksA % kNumThreads == 0 || kCopiesA == 1,
                "only a single round of A copies may be partly idle");
  static_assert(kRowsPerCopyA % 8 == 0,
                "the swizzle repeats every 8 rows, so all copies of a thread share it");
  static_assert(kNumStages >= 3, "at least two k tiles under way hide the latency of memory");
};

template <class T, class S>
struct GemmShared {
  static constexpr int kChunksPerRowS = T::BLOCK_N * 2 / 16; /* 16 bits a channel in every scheme */
  static constexpr int kChunksS = S::kHasGroups ? S::kGroupsPerTile * kChunksPerRowS : 0;
  static constexpr int kStageBytesS = kChunksS * 16;
  static constexpr int kBytes = T::kNumStages * (T::kStageBytesA + T::kStageBytesB + kStageBytesS);
  static_assert(kChunksS <= T::kNumThreads, "a thread copies at most one chunk of scales");
  static_assert(T::kNumStages % S::kTilesPerGroup == 0,
                "a round of stages is made of whole groups: the phase of a tile is a constant of the loop");
  static_assert(tile_is_offered(T::WARP_M, T::WARP_N, S::kKind, S::kGroupSize),
                "sums must fit the registers, and scale pairs may not hold up the tensor cores");
};

struct GemmParams {
  const int8_t* a;         /* INT8 [m, 64 * num_k_tiles], row-major */
  const unsigned char* b;  /* INT4, packed (layout.h) */
  const unsigned char* s;  /* FP16 or two_level pairs [num_groups][padded_n]; not read per channel */
  const float* row_scales; /* FP32 [m] */
  const int32_t* row_sums; /* INT32 [m]; two_level only */
  uint32_t* partials;      /* Accumulator [split_k][m][padded_n]; null when split_k is 1 */
  Output out;
  int m;
  int padded_n;
  int num_k_tiles;
  int num_groups;
  int split_k;
};

/* ---- which part is whose ---- */

struct BlockTile {
  int m, n; /* in tiles */
};

/*
 * Thread blocks that run at the same time should share operands in L2. They go down panels of kPanelM tiles
 * along m, so a wave of b blocks reads kPanelM tiles of x and b / kPanelM tiles of w, not one row of tiles
 * and all of w.
 */
inline constexpr int kPanelM = 8;
__device__ __forceinline__ BlockTile block_tile(int block, int tiles_m, int tiles_n) {
  const int panel = block / (kPanelM * tiles_n);
  const int within = block % (kPanelM * tiles_n);
  const int rest = tiles_m - panel * kPanelM;
  const int height = rest < kPanelM ? rest : kPanelM;
  return {panel * kPanelM + within % height, within / height};
}

__device__ constexpr int ceil_divide(int a, int b) { return (a + b - 1) / b; }

/* First k tile of part `split`. Parts are made of whole groups, and differ by at most one. */
template <class S>
__device__ __forceinline__ int first_k_tile(int num_k_tiles, int split, int split_k) {
  const int units = num_k_tiles / S::kTilesPerGroup; /* at most 1024: the product below is small */
  return units * split / split_k * S::kTilesPerGroup;
}

}  // namespace fptq

#endif  // FPTQ_SRC_GEMM_SHAPES_CUH
