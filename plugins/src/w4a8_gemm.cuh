/*
 * y[m, n] = sum over k of x[m, k] * w[n, k], INT8 times INT4, for any m, on the tensor cores (mma.m16n8k32).
 *
 * A thread block owns a tile of y and walks over k in tiles of 64. cp.async keeps kNumStages - 1 k tiles
 * under way. Weights lie in fragment order (layout.h), so a lane's share of 16 x 64 codes is one 16-byte
 * load; activations go through ldmatrix.
 *
 * Names: operand (a: activation, b: weight, s: scales) after memory (gmem, smem).
 */
#ifndef FPTQ_SRC_W4A8_GEMM_CUH
#define FPTQ_SRC_W4A8_GEMM_CUH

#include "gemm_shapes.cuh"
#include "ptx_ops.h"
#include "scale_pairs.cuh"
#include "scheme.cuh"

namespace fptq {

template <class T, class S>
__global__ void __launch_bounds__(T::kNumThreads, T::kMinBlocks) w4a8_gemm_kernel(const GemmParams p) {
  using Shared = GemmShared<T, S>;
  constexpr int kNumStages = T::kNumStages;
  constexpr int MI = T::kFragmentsM;
  constexpr int NI = T::kFragmentsN;

  unsigned char* smem_a = dynamic_shared(); /* INT8 [stage][BLOCK_M][64], chunks swizzled */
  unsigned char* smem_b = smem_a + kNumStages * T::kStageBytesA; /* INT4 [stage][BLOCK_N / 16] packed tiles */
  unsigned char* smem_s =
      smem_b + kNumStages * T::kStageBytesB; /* 16 bits [stage][group of the tile][BLOCK_N] */

  const int thread = thread_id();
  const int lane = thread % 32;
  const int warp = warp_id();
  const int warp_m = warp % T::kWarpsM;
  const int warp_n = warp / T::kWarpsM;
  const int tiles_m = (p.m + T::BLOCK_M - 1) / T::BLOCK_M;
  const int tiles_n = (p.padded_n + T::BLOCK_N - 1) / T::BLOCK_N;
  const BlockTile block = block_tile(block_id_x(), tiles_m, tiles_n);
  const int block_row = block.m * T::BLOCK_M;
  const int block_column = block.n * T::BLOCK_N;
  const int split = block_id_y();
  const int first_tile = first_k_tile<S>(p.num_k_tiles, split, p.split_k);
  const int num_tiles = first_k_tile<S>(p.num_k_tiles, split + 1, p.split_k) - first_tile;
  const int k_bytes = p.num_k_tiles * T::BLOCK_K;

  /*
   * Copy plan: pointers that advance once a round of kNumStages k tiles; within a round the offsets of a
   * and b are constants of the instructions. Rows of a and channels of b past the end are filled with zeros.
   */
  const int8_t* gmem_a[T::kCopiesA];
  bool valid_a[T::kCopiesA];
  const int chunk_row = thread / T::kChunksPerRowA;
  const int chunk_column = thread % T::kChunksPerRowA;
#pragma unroll
  for (int i = 0; i < T::kCopiesA; ++i) {
    const int row = block_row + chunk_row + i * T::kRowsPerCopyA;
    valid_a[i] = row < p.m;
    gmem_a[i] = p.a + static_cast<size_t>(valid_a[i] ? row : 0) * k_bytes + first_tile * T::BLOCK_K +
                chunk_column * 16;
  }
  /* 64-byte rows: XOR with row / 2 spreads the 8 rows of an ldmatrix over all 32 banks. */
  const int write_offset_a = chunk_row * T::BLOCK_K + ((chunk_column ^ (chunk_row / 2 % 4)) * 16);

  const unsigned char* gmem_b[T::kCopiesB];
  bool valid_b[T::kCopiesB];
#pragma unroll
  for (int i = 0; i < T::kCopiesB; ++i) {
    const int n_tile = block_column / FPTQ_TILE_N + (thread + i * T::kNumThreads) / 32;
    valid_b[i] = n_tile * FPTQ_TILE_N < p.padded_n;
    gmem_b[i] =
        p.b + (static_cast<size_t>(valid_b[i] ? n_tile : 0) * p.num_k_tiles + first_tile) * FPTQ_TILE_BYTES +
        lane * 16;
  }

  const int s_column = block_column + thread % Shared::kChunksPerRowS * 8;
  /* Whole warps where that is possible: a branch that no warp parts at costs less. */
  const bool copies_s = Shared::kChunksS % 32 == 0 ? warp * 32 < Shared::kChunksS : thread < Shared::kChunksS;
  const int s_group = first_tile / S::kTilesPerGroup * S::kGroupsPerTile + thread / Shared::kChunksPerRowS;
  /* K tiles from where the pointers are on in which this thread's chunk has a group: where a k tile holds
   * several groups the last ones may be missing. */
  int tiles_left_s = ceil_divide(p.num_groups - s_group, S::kGroupsPerTile);
  /* Channels past the end get the scales of channel 0; their sums are not stored. */
  const unsigned char* gmem_s =
      p.s + (static_cast<size_t>(s_group) * p.padded_n + (s_column < p.padded_n ? s_column : 0)) * 2;
  const int s_step = S::kGroupsPerTile * p.padded_n * 2;

  /* Starts the copies of the k tile `offset` after the one that the pointers are at. `number` counts from the
   * first tile of a round: stage and phase within a group. */
  const auto fetch_tile = [&](int number, int offset) {
    const int stage = number % kNumStages;
    const int phase = number % S::kTilesPerGroup;
    unsigned char* stage_a = smem_a + stage * T::kStageBytesA;
    unsigned char* stage_b = smem_b + stage * T::kStageBytesB;
#pragma unroll
    for (int i = 0; i < T::kCopiesA; ++i) {
      if (T::kChunksA % T::kNumThreads == 0 || thread < T::kChunksA) {
        cp_async_16(stage_a + write_offset_a + i * T::kRowsPerCopyA * T::BLOCK_K,
                    gmem_a[i] + offset * T::BLOCK_K, valid_a[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < T::kCopiesB; ++i) {
      cp_async_16(stage_b + (thread + i * T::kNumThreads) * 16, gmem_b[i] + offset * FPTQ_TILE_BYTES,
                  valid_b[i]);
    }
    if constexpr (S::kHasGroups) {
      if (S::loads_scales(phase)) {
        const bool exists = S::kGroupsPerTile == 1 || offset < tiles_left_s;
        if (copies_s) cp_async_16(smem_s + stage * Shared::kStageBytesS + thread * 16, gmem_s, exists);
      }
      if (phase == S::kTilesPerGroup - 1) gmem_s += s_step;
    }
  };

  /* Moves the pointers on by so many k tiles; those of the scales moved with their copies. */
  const auto advance = [&](int tiles) {
#pragma unroll
    for (int i = 0; i < T::kCopiesA; ++i) gmem_a[i] += tiles * T::BLOCK_K;
#pragma unroll
    for (int i = 0; i < T::kCopiesB; ++i) gmem_b[i] += tiles * FPTQ_TILE_BYTES;
    if constexpr (S::kGroupsPerTile > 1) tiles_left_s -= tiles;
  };

  int sums[MI][NI][4];                     /* INT32: of the current group when folding, else of all k */
  float folded[S::kFolds ? MI : 1][NI][4]; /* FP32: sum over groups of (16 * exact sum) * group scale */
#pragma unroll
  for (int i = 0; i < MI; ++i) {
#pragma unroll
    for (int j = 0; j < NI; ++j) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        sums[i][j][q] = 0;
        if constexpr (S::kFolds) folded[i][j][q] = 0.0f;
      }
    }
  }

  const int magic[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};

  /* Adds the finished sums of the group in row `group_row` of the stage, times its scales. */
  const auto fold = [&](const unsigned char* stage_s, int group_row, [[maybe_unused]] int group) {
    if constexpr (S::kFolds) {
#pragma unroll
      for (int j = 0; j < NI; ++j) {
        const int column = warp_n * T::WARP_N + j * 8 + lane % 4 * 2;
        const uint32_t pair = load_shared<uint32_t>(stage_s + (group_row * T::BLOCK_N + column) * 2);
        const float scale0 = float_from_half(static_cast<uint16_t>(pair));
        const float scale1 = float_from_half(static_cast<uint16_t>(pair >> 16));
#pragma unroll
        for (int i = 0; i < MI; ++i) {
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const float sum = float_from_bits(static_cast<uint32_t>(sums[i][j][q])) - kMagicFloat;
            trace_group_sum(block_row + warp_m * T::WARP_M + i * 16 + q / 2 * 8 + lane / 4,
                            block_column + column + q % 2, group, (sums[i][j][q] - kMagicBits) >> kCodeShift);
            folded[i][j][q] = fma_rn(sum, q % 2 == 0 ? scale0 : scale1, folded[i][j][q]);
          }
        }
      }
    }
  };

  /* Addresses of a lane within a stage; the row part of the swizzle is the same for every 16 rows. */
  const int read_offset_a = (warp_m * T::WARP_M + lane % 16) * T::BLOCK_K;
  const int read_swizzle_a = lane / 2 % 4;
  const int read_offset_b = warp_n * T::WARP_N / FPTQ_TILE_N * FPTQ_TILE_BYTES + lane * 16;
  const int read_offset_s = ScalePairs<S, NI>::lane_offset(lane, T::BLOCK_N, warp_n * T::WARP_N);

  [[maybe_unused]] ScalePairs<S, NI> pairs; /* two_level: of the k tile, or of the group that spans it */

  const auto multiply_tile = [&](int stage, int phase, int tile) {
    const unsigned char* stage_a = smem_a + stage * T::kStageBytesA + read_offset_a;
    const unsigned char* stage_b = smem_b + stage * T::kStageBytesB + read_offset_b;
    const unsigned char* stage_s = smem_s + stage * Shared::kStageBytesS;
    uint4 b[NI / 2];
#pragma unroll
    for (int j = 0; j < NI / 2; ++j) b[j] = load_shared<uint4>(stage_b + j * FPTQ_TILE_BYTES);
    if constexpr (S::kTwoLevel) {
      if (S::loads_scales(phase)) pairs.load(stage_s + read_offset_s, T::BLOCK_N);
    }
#pragma unroll
    for (int step = 0; step < 2; ++step) { /* 32 of the 64 input channels */
      uint32_t a[MI][4];
#pragma unroll
      for (int i = 0; i < MI; ++i) {
        const int chunk = step * 2 + lane / 16;
        ldmatrix_x4(a[i], stage_a + i * 16 * T::BLOCK_K + (chunk ^ read_swizzle_a) * 16);
      }
      constexpr int kGroupsPerStep = S::kGroupsPerTile >= 2 ? S::kGroupsPerTile / 2 : 1;
      const int group_row = S::kGroupsPerTile >= 2 ? step * kGroupsPerStep : 0;
      const int group = tile / S::kTilesPerGroup * S::kGroupsPerTile + group_row;

      if constexpr (S::kFolds && S::kGroupSize == 16) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int j = 0; j < NI; ++j) {
            const uint32_t word =
                (j % 2 == 0) ? (step == 0 ? b[j / 2].x : b[j / 2].y) : (step == 0 ? b[j / 2].z : b[j / 2].w);
            const uint32_t codes = half == 0 ? low_codes_times_16(word) : high_codes_times_16(word);
#pragma unroll
            for (int i = 0; i < MI; ++i)
              mma_s8_s8_k16(sums[i][j], a[i][2 * half], a[i][2 * half + 1], codes, magic);
          }
          fold(stage_s, group_row + half, group + half);
        }
      } else {
        const bool starts_group = S::kGroupSize <= 32 || (step == 0 && phase == 0);
#pragma unroll
        for (int j = 0; j < NI; ++j) {
          const uint32_t word =
              (j % 2 == 0) ? (step == 0 ? b[j / 2].x : b[j / 2].y) : (step == 0 ? b[j / 2].z : b[j / 2].w);
          if constexpr (S::kTwoLevel) {
            const TwoLevelScale low = pairs.scale(group_row, j);
            const TwoLevelScale high = S::kGroupSize == 16 ? pairs.scale(group_row + 1, j) : low;
            const uint32_t b0 = low_codes_two_level(word, low);
            const uint32_t b1 = high_codes_two_level(word, high);
#pragma unroll
            for (int i = 0; i < MI; ++i) mma_s8_u8(sums[i][j], a[i], b0, b1, sums[i][j]);
          } else {
            const uint32_t b0 = low_codes_times_16(word);
            const uint32_t b1 = high_codes_times_16(word);
#pragma unroll
            for (int i = 0; i < MI; ++i) {
              if (S::kFolds && starts_group) {
                mma_s8_s8(sums[i][j], a[i], b0, b1, magic);
              } else {
                mma_s8_s8(sums[i][j], a[i], b0, b1, sums[i][j]);
              }
            }
          }
        }
        const bool ends_group = S::kGroupSize <= 32 || (step == 1 && phase == S::kTilesPerGroup - 1);
        if (S::kFolds && ends_group) fold(stage_s, group_row, group);
      }
    }
  };

  const auto store_results = [&] {
#pragma unroll
    for (int i = 0; i < MI; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = block_row + warp_m * T::WARP_M + i * 16 + half * 8 + lane / 4;
        if (row >= p.m) continue;
        RowScale x = {0.0f, 0};
        if (p.partials == nullptr) {
          x.scale = load_global_constant<float>(p.row_scales + row);
          if constexpr (S::kTwoLevel) x.row_sum = load_global_constant<int32_t>(p.row_sums + row);
        }
#pragma unroll
        for (int j = 0; j < NI; ++j) {
          const int column = block_column + warp_n * T::WARP_N + j * 8 + lane % 4 * 2;
          if (column >= p.out.n) continue;
          typename S::Accumulator sum0, sum1;
          if constexpr (S::kFolds) {
            sum0 = folded[i][j][half * 2];
            sum1 = folded[i][j][half * 2 + 1];
          } else {
            sum0 = sums[i][j][half * 2];
            sum1 = sums[i][j][half * 2 + 1];
          }
          if (p.partials == nullptr) {
            finish_pair<S::kKind>(p.out, row, column, sum0, sum1, x);
          } else {
            const uint2 bits = {bits_from_accumulator(sum0), bits_from_accumulator(sum1)};
            store_global<uint2>(p.partials + (static_cast<size_t>(split) * p.m + row) * p.padded_n + column,
                                bits);
          }
        }
      }
    }
  };

  /* Fill the pipeline. Empty groups are committed too, so that the number of groups under way tells which
   * tile has arrived. */
#pragma unroll
  for (int t = 0; t < kNumStages - 1; ++t) {
    if (t < num_tiles) fetch_tile(t, t);
    cp_async_commit();
  }
  advance(kNumStages - 1); /* the offsets of a round start at 0: no address arithmetic between its tiles */

  /* Unrolled by the number of stages, an even number: stage and phase within a group are constants. */
  for (int left = num_tiles; left > 0; left -= kNumStages) {
#pragma unroll
    for (int u = 0; u < kNumStages; ++u) {
      if (u >= left) break;
      cp_async_wait<kNumStages - 2>(); /* this thread's part of the tile has arrived ... */
      sync_block(); /* ... everybody's has, and nobody still reads the stage that is refilled next */
      if (u + kNumStages - 1 < left) fetch_tile(u + kNumStages - 1, u);
      cp_async_commit();
      multiply_tile(u, u % S::kTilesPerGroup, first_tile + num_tiles - left + u);
    }
    advance(kNumStages);
  }
  store_results(); /* groups still under way are empty */
}

}  // namespace fptq

#endif  // FPTQ_SRC_W4A8_GEMM_CUH
