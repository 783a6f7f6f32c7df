/*
 * y[m, n] for m <= 4: one thread block a packed tile of 16 channels, dp4a on the weights as they come from
 * memory.
 *
 * The bound is memory: the block asks for its first weights, quantizes x into shared memory while they
 * travel, and its warps then share the k tiles. Sums are added in a fixed order: within a lane along k, over
 * the 4 lanes of a channel, over the warps. That order does not depend on m, so a row's result is the same
 * whatever other rows are in the batch.
 */
#ifndef FPTQ_SRC_W4A8_GEMV_CUH
#define FPTQ_SRC_W4A8_GEMV_CUH

#include "gemm_tiles.h"
#include "ptx_ops.h"
#include "quantize_row.cuh"
#include "scheme.cuh"

namespace fptq {

inline constexpr int kGemvThreads = kGemvWarps * 32;
inline constexpr int kGemvMinBlocks =
    2; /* leaves 128 registers; left to itself the compiler aims higher and spills */
inline constexpr int kGemvWordsPerTile = FPTQ_TILE_K / 4;

struct GemvParams {
  RowSource source;
  const unsigned char* b; /* INT4, packed (layout.h) */
  const uint16_t* s;      /* FP16 or two_level pairs [num_groups][padded_n]; not read per channel */
  Output out;
  int padded_n;
  int num_k_tiles;
  int num_groups;
};

/* Shared memory: codes [rows][64 * num_k_tiles], then scratch of quantize_row for each row, then sums
 * [warp][row][16]. */
__host__ __device__ inline size_t gemv_codes_bytes(int rows, int padded_k) {
  return static_cast<size_t>(rows) * static_cast<size_t>(padded_k);
}
inline size_t gemv_bytes(int rows, int padded_k) {
  return gemv_codes_bytes(rows, padded_k) +
         static_cast<size_t>(rows) * (kQuantizeScratchBytes + kGemvWarps * FPTQ_TILE_N * 4);
}

/* A lane's share of a k tile: codes of channels lane / 4 and lane / 4 + 8, and their scales. */
template <class S>
struct GemvTile {
  uint4 b;
  uint16_t scales[S::kGroupsPerTile][2];
};

template <int kRows, class S>
__global__ void __launch_bounds__(kGemvThreads, kGemvMinBlocks) w4a8_gemv_kernel(const GemvParams p) {
  using Accumulator = typename S::Accumulator;
  static_assert(kGemvDepth % S::kTilesPerGroup == 0,
                "the phase within a group must be a constant of the unrolled loop");
  const int lane = thread_id() % 32;
  const int warp = thread_id() / 32;
  const int n_tile = block_id_x();
  const int padded_k = p.source.padded_k;

  unsigned char* smem_codes = dynamic_shared();
  unsigned char* smem_scratch = smem_codes + gemv_codes_bytes(kRows, padded_k);
  Accumulator* smem_sums = reinterpret_cast<Accumulator*>(smem_scratch + kRows * kQuantizeScratchBytes);

  /* Warp w takes groups of tiles w, w + kGemvWarps, ... so that all warps read neighbouring memory at a time.
   */
  const int num_units = p.num_k_tiles / S::kTilesPerGroup;
  const int my_units = num_units > warp ? (num_units - warp + kGemvWarps - 1) / kGemvWarps : 0;
  const int my_tiles = my_units * S::kTilesPerGroup;
  const auto tile_index = [&](int i) {
    return (warp + i / S::kTilesPerGroup * kGemvWarps) * S::kTilesPerGroup + i % S::kTilesPerGroup;
  };
  const unsigned char* gmem_b =
      p.b + static_cast<size_t>(n_tile) * p.num_k_tiles * FPTQ_TILE_BYTES + lane * 16;
  const int channel = n_tile * FPTQ_TILE_N + lane / 4;

  const auto load_tile = [&](int i, int phase) {
    const int tile = tile_index(i);
    GemvTile<S> loaded;
    loaded.b = load_global_once(gmem_b + static_cast<size_t>(tile) * FPTQ_TILE_BYTES);
#pragma unroll
    for (int g = 0; g < S::kGroupsPerTile; ++g) {
      const int group = tile / S::kTilesPerGroup * S::kGroupsPerTile + g;
      const bool wanted = (S::kTwoLevel || S::loads_scales(phase)) && group < p.num_groups;
      const size_t index = static_cast<size_t>(wanted ? group : 0) * p.padded_n + channel;
      loaded.scales[g][0] = wanted ? load_global_constant<uint16_t>(p.s + index) : uint16_t{0};
      loaded.scales[g][1] = wanted ? load_global_constant<uint16_t>(p.s + index + 8) : uint16_t{0};
    }
    return loaded;
  };

  GemvTile<S> tiles[kGemvDepth] = {};
#pragma unroll
  for (int d = 0; d < kGemvDepth; ++d) {
    if (d < my_tiles) tiles[d] = load_tile(d, d % S::kTilesPerGroup);
  }

  /* Codes are stored so that a lane's four words of a k tile (two steps, low and high nibbles) are one
   * 16-byte load. */
  RowScale row_scales[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    unsigned char* codes = smem_codes + row * padded_k;
    row_scales[row] =
        quantize_row(p.source, row, kGemvThreads, smem_scratch + row * kQuantizeScratchBytes, S::kTwoLevel,
                     [&](int vector, uint2 words) {
                       const int word = vector * 2 % kGemvWordsPerTile;
                       unsigned char* tile = codes + vector * 2 / kGemvWordsPerTile * FPTQ_TILE_K;
                       store_shared<uint32_t>(tile + (word % 4 * 4 + word / 4) * 4, words.x);
                       store_shared<uint32_t>(tile + ((word + 1) % 4 * 4 + word / 4) * 4, words.y);
                     });
  }
  sync_block();

  /* INT32: of the current group when folding (in the bits of a magic float, scheme.cuh), else of all k */
  constexpr int kFirstSum = S::kFolds ? kMagicBits : 0;
  int sums[2][kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) sums[0][row] = sums[1][row] = kFirstSum;
  Accumulator folded[2][kRows] = {};

  const auto fold = [&](const uint16_t (&scales)[2], [[maybe_unused]] int group) {
    if constexpr (S::kFolds) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float scale = float_from_half(scales[half]);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          trace_group_sum(row, channel + half * 8, group, (sums[half][row] - kMagicBits) >> kCodeShift);
          const float sum = float_from_bits(static_cast<uint32_t>(sums[half][row])) - kMagicFloat;
          folded[half][row] = fma_rn(sum, scale, folded[half][row]);
          sums[half][row] = kFirstSum;
        }
      }
    }
  };

  const auto multiply_tile = [&](const GemvTile<S>& tile, int index, int phase) {
    const unsigned char* codes = smem_codes + index * FPTQ_TILE_K + lane % 4 * 16;
    uint4 x[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) x[row] = load_shared<uint4>(codes + row * padded_k);
    const uint32_t words[2][2] = {{tile.b.x, tile.b.z}, {tile.b.y, tile.b.w}}; /* [step][channel half] */
    const int first_group = index / S::kTilesPerGroup * S::kGroupsPerTile;
#pragma unroll
    for (int quarter = 0; quarter < 4;
         ++quarter) { /* 16 input channels: step quarter / 2, low or high nibbles */
      const int in_tile =
          quarter * 16 / (S::kHasGroups && S::kGroupSize < FPTQ_TILE_K ? S::kGroupSize : FPTQ_TILE_K);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t word = words[quarter / 2][half];
        uint32_t codes4;
        if constexpr (S::kTwoLevel) {
          const TwoLevelScale scale = two_level_from_pair<0>(tile.scales[in_tile][half]);
          codes4 = quarter % 2 == 0 ? low_codes_two_level(word, scale) : high_codes_two_level(word, scale);
        } else {
          codes4 = quarter % 2 == 0 ? low_codes_times_16(word) : high_codes_times_16(word);
        }
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          const uint32_t x4 = quarter == 0   ? x[row].x
                              : quarter == 1 ? x[row].y
                              : quarter == 2 ? x[row].z
                                             : x[row].w;
          sums[half][row] = S::kTwoLevel ? dp4a_s8_u8(x4, codes4, sums[half][row])
                                         : dp4a_s8_s8(x4, codes4, sums[half][row]);
        }
      }
      constexpr int kQuartersPerGroup = S::kHasGroups && S::kGroupSize < FPTQ_TILE_K ? S::kGroupSize / 16 : 4;
      const bool ends_group =
          quarter % kQuartersPerGroup == kQuartersPerGroup - 1 && phase == S::kTilesPerGroup - 1;
      if (S::kFolds && ends_group) fold(tile.scales[in_tile], first_group + in_tile);
    }
  };

  for (int base = 0; base < my_tiles; base += kGemvDepth) {
#pragma unroll
    for (int d = 0; d < kGemvDepth; ++d) {
      const int i = base + d;
      if (i >= my_tiles) break;
      const GemvTile<S> current = tiles[d];
      if (i + kGemvDepth < my_tiles) tiles[d] = load_tile(i + kGemvDepth, d % S::kTilesPerGroup);
      multiply_tile(current, tile_index(i), d % S::kTilesPerGroup);
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      Accumulator sum;
      if constexpr (S::kFolds) {
        sum = folded[half][row];
      } else {
        sum = sums[half][row];
      }
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (lane % 4 == 0) {
        store_shared<Accumulator>(smem_sums + (warp * kRows + row) * FPTQ_TILE_N + half * 8 + lane / 4, sum);
      }
    }
  }
  sync_block();

  constexpr int kPairs = FPTQ_TILE_N / 2;
#pragma unroll
  for (int row = 0; row < kRows; ++row) { /* unrolled: row_scales stays in registers */
    const int pair = thread_id() - row * kPairs;
    const int column = n_tile * FPTQ_TILE_N + pair * 2;
    if (pair < 0 || pair >= kPairs || column >= p.out.n) continue;
    Accumulator sum0 = 0, sum1 = 0;
#pragma unroll
    for (int w = 0; w < kGemvWarps; ++w) {
      const uint2 bits = load_shared<uint2>(smem_sums + (w * kRows + row) * FPTQ_TILE_N + pair * 2);
      sum0 += accumulator_from_bits<Accumulator>(bits.x);
      sum1 += accumulator_from_bits<Accumulator>(bits.y);
    }
    finish_pair<S::kKind>(p.out, row, column, sum0, sum1, row_scales[row]);
  }
}

}  // namespace fptq

#endif  // FPTQ_SRC_W4A8_GEMV_CUH
