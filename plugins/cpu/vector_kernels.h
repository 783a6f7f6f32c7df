/*
 * The kernels, written once over a vector type V (scalar.cpp, avx2.cpp, avx512_vnni.cpp), which wraps one instruction a
 * function. V lives in an unnamed namespace, so each file gets its own instantiations. What V names:
 *
 * - Float, Int: kLanes FP32 or INT32 values.
 * - Bytes: 4 * kLanes bytes, either unsigned weight codes or four signed activation codes repeated in every lane.
 * - Partial: where products are added up. Int where kFlushK is 0, else narrower integers, widened every kFlushK channels.
 * - power_of_two: 2^n as a Float, for n in [-126, 127].
 * - kTileRows, kTileVectors: most rows of a tile of accumulators, and its vectors of output channels.
 * - kRowVectors: vectors of output channels of a tile that has one row and is alone: the more there are, the longer the
 *   runs of memory that it reads.
 * - kTwoChainRows: tiles of up to this many rows add the high nibbles' products up on their own, because few rows have
 *   too few independent sums to hide the latency of a dot product. 0 where kFlushK is not.
 */
#ifndef FPTQ_CPU_VECTOR_KERNELS_H
#define FPTQ_CPU_VECTOR_KERNELS_H

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#define FPTQ_INLINE inline __attribute__((always_inline))

namespace fptq::cpu {

// A chunk's widened weights (16 KiB), a tile's activations (4 KiB) and the partial sums (16 KiB) share a first-level
// cache of 48 KiB.
inline constexpr int kChunkK = 512;
inline constexpr int kChunkRows = 128;
inline constexpr int kPrefetchBytes = 4096;  // how far ahead of the codes of a single row memory is asked for
inline constexpr float kMaxActivation = 127.0f;
inline constexpr float kMinActivation = -128.0f;
inline constexpr float kPerTokenEps = 1e-6f;  // fptq_export.numerics.PER_TOKEN_EPS

constexpr FPTQ_INLINE int smaller(int a, int b) { return a < b ? a : b; }
constexpr FPTQ_INLINE int larger(int a, int b) { return a > b ? a : b; }

/* ---- activation ---- */

// kLanes values of a row from channel k on, zero from channel k_end on.
template <class V, class X>
FPTQ_INLINE typename V::Float load_activation(const X* x_row, int k, int k_end) {
  if (k + V::kLanes <= k_end) return V::load(x_row + k);
  X padded[V::kLanes] = {};
  memcpy(padded, x_row + k, static_cast<size_t>(k_end - k) * sizeof(X));
  return V::load(padded);
}

// max|x| of a row. Magnitudes are compared as bit patterns, where a NaN is larger than every number and so
// survives.
template <class V, class X>
FPTQ_INLINE float row_absmax(const X* x_row, int k_end) {
  typename V::Int absmax = V::set(0);
  for (int k = 0; k < k_end; k += V::kLanes) {
    absmax = V::max_magnitude(absmax, load_activation<V>(x_row, k, k_end));
  }
  const int32_t bits = V::reduce_max(absmax);
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class V, class X>
FPTQ_INLINE void quantize_row_of(const QuantizeArgs& args, const X* x_row, int32_t row) {
  float scale = args.x_scale;
  if (args.per_token) {
    const float absmax = row_absmax<V>(x_row, args.k);
    scale = (absmax < kPerTokenEps ? kPerTokenEps : absmax) / kMaxActivation;
  }
  args.scales[row] = scale;
  const typename V::Float divisor = V::set(scale), low = V::set(kMinActivation),
                          high = V::set(kMaxActivation);
  int8_t* codes = args.codes + static_cast<size_t>(row) * args.code_stride;
  int32_t* starts = args.starts + static_cast<size_t>(row) * args.groups;
  for (int group = 0; group < args.groups; ++group) {
    const int k_end = (group + 1) * args.group_k;
    typename V::Int sum = V::set(0);
    for (int k = group * args.group_k; k < k_end; k += V::kLanes) {
      // Clipping comes before rounding: the limits are integers, and a large ratio would not fit an integer.
      const typename V::Float ratio = V::divide(load_activation<V>(x_row, k, k_end), divisor);
      const typename V::Int code = V::round(V::min(V::max(ratio, low), high));
      V::store_codes(codes + k, code);
      sum = V::add(sum, code);
    }
    starts[group] = -kZeroCode * V::reduce_add(sum);
  }
}

template <class V>
void quantize_row(const QuantizeArgs& args, int32_t row) {
  const size_t offset = static_cast<size_t>(row) * args.k;
  // Only a row of one group has padding; the stores below may end before it does.
  memset(args.codes + static_cast<size_t>(row) * args.code_stride + args.k, 0, args.code_stride - args.k);
  if (args.input_type == FPTQ_CPU_FLOAT32) {
    quantize_row_of<V>(args, static_cast<const float*>(args.x) + offset, row);
  } else {
    quantize_row_of<V>(args, static_cast<const _Float16*>(args.x) + offset, row);
  }
}

/* ---- multiplication ---- */

// Where a tile finds the codes of a step as bytes: in the packed weight ...
template <class V>
struct PackedCodes {
  static constexpr int kBytes = kStepBytes;  // of a step
  static typename V::Bytes low(const uint8_t* step) { return V::low_nibbles(V::load_bytes(step)); }
  static typename V::Bytes high(const uint8_t* step) { return V::high_nibbles(V::load_bytes(step)); }
};

// ... or in a copy with a byte for each nibble, low ones first, which pays as soon as two tiles read it.
template <class V>
struct WideCodes {
  static constexpr int kBytes = 2 * kStepBytes;
  static typename V::Bytes low(const uint8_t* step) { return V::load_bytes(step); }
  static typename V::Bytes high(const uint8_t* step) { return V::load_bytes(step + kStepBytes); }
};

// wide: [steps][2][kStepBytes]
template <class V>
FPTQ_INLINE void widen_codes(const uint8_t* packed, int steps, uint8_t* wide) {
  for (int step = 0; step < steps; ++step, packed += kStepBytes, wide += WideCodes<V>::kBytes) {
    for (int i = 0; i < kStepBytes; i += 4 * V::kLanes) {
      V::store_bytes(wide + i, PackedCodes<V>::low(packed + i));
      V::store_bytes(wide + kStepBytes + i, PackedCodes<V>::high(packed + i));
    }
  }
}

// Adds the dot products of the steps from channel k to k_end to `sums`: those of the low nibbles to the first chain,
// those of the high ones to the last. x: the tile's first row; w: the tile's first channel in the first step.
template <class V, class Codes, int CHAINS, int ROWS, int kVectors>
FPTQ_INLINE void dot_steps(typename V::Partial (&sums)[CHAINS][ROWS][kVectors], const int8_t* x,
                           size_t x_stride, const uint8_t* w, int k, int k_end) {
  for (; k < k_end; k += kStepK, w += Codes::kBytes) {
    if constexpr (ROWS == 1) {
      // Nothing else hides the way from memory: every code is read once.
      for (int i = 0; i < 4 * V::kLanes * kVectors; i += kCacheLine)
        __builtin_prefetch(w + kPrefetchBytes + i);
    }
    typename V::Bytes low[kVectors], high[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      low[v] = Codes::low(w + 4 * V::kLanes * v);
      high[v] = Codes::high(w + 4 * V::kLanes * v);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const typename V::Bytes codes = V::repeat(x + r * x_stride + k);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[0][r][v] = V::dot(sums[0][r][v], low[v], codes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const typename V::Bytes codes = V::repeat(x + r * x_stride + k + kStepK / 2);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        sums[CHAINS - 1][r][v] = V::dot(sums[CHAINS - 1][r][v], high[v], codes);
    }
  }
}

// Sets `sums` to zero, or to the starts of the accumulators in the first chain.
template <class V, int CHAINS, int ROWS, int kVectors>
FPTQ_INLINE void set_sums(typename V::Partial (&sums)[CHAINS][ROWS][kVectors], const int32_t* starts,
                          size_t starts_stride) {
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sums[0][r][v] = V::set(starts == nullptr ? 0 : starts[r * starts_stride]);
      if constexpr (CHAINS == 2) sums[1][r][v] = V::set(0);
    }
  }
}

// acc: the sums of one group, starts included.
template <class V, class Codes, int ROWS, int kVectors>
FPTQ_INLINE void sum_group(typename V::Int (&acc)[ROWS][kVectors], const int32_t* starts,
                           size_t starts_stride, const int8_t* x, size_t x_stride, const uint8_t* w,
                           int group_k) {
  constexpr int kChains = ROWS <= V::kTwoChainRows ? 2 : 1;
  typename V::Partial sums[kChains][ROWS][kVectors];
  if constexpr (V::kFlushK == 0) {
    set_sums<V>(sums, starts, starts_stride);
    dot_steps<V, Codes>(sums, x, x_stride, w, 0, group_k);
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] = kChains == 2 ? V::add(sums[0][r][v], sums[1][r][v]) : sums[0][r][v];
      }
    }
  } else {
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < kVectors; ++v) acc[r][v] = V::set(starts[r * starts_stride]);
    }
    for (int k = 0; k < group_k; k += V::kFlushK) {
      set_sums<V>(sums, nullptr, 0);
      dot_steps<V, Codes>(sums, x, x_stride, w + k / kStepK * Codes::kBytes, k,
                          smaller(k + V::kFlushK, group_k));
      for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < kVectors; ++v) acc[r][v] = V::add(acc[r][v], V::widen(sums[0][r][v]));
      }
    }
  }
}

// The sums of one row and group: kLanes channels from channel n on, as far as there are any.
template <class V>
FPTQ_INLINE void write_sums(const MultiplyArgs& args, typename V::Int acc, int row, int group, int n) {
  int32_t lanes[V::kLanes];
  V::store(lanes, acc);
  const int count = smaller(V::kLanes, args.n - n);
  if (count <= 0) return;
  const size_t line = static_cast<size_t>(row) * args.groups + group;
  memcpy(static_cast<int32_t*>(args.y) + line * args.n + n, lanes,
         static_cast<size_t>(count) * sizeof(int32_t));
}

// The groups of a chunk, and the codes of a block's channels in the first of them.
struct Chunk {
  int begin, end;
  const uint8_t* codes;
};

// Where a tile lies: its first row, its block of 32 channels, and its first channel inside the block.
struct TilePlace {
  int row, block, column;
};

// partial: FP32 [ROWS][kBlockN] at the tile's first column; the groups of the chunk are added to it.
template <class V, class Codes, bool ONLY_SUMS, int ROWS, int kVectors>
void multiply_tile(const MultiplyArgs& args, TilePlace place, Chunk chunk, float* partial) {
  const int group_bytes = args.group_k / kStepK * Codes::kBytes;
  const uint8_t* w = chunk.codes + 4 * place.column;
  const size_t first_group = static_cast<size_t>(place.block) * args.groups + chunk.begin;
  const uint16_t* w_scale = args.w_scales + first_group * kBlockN + place.column;
  const int8_t* x = args.codes + static_cast<size_t>(place.row) * args.code_stride;
  const int32_t* starts = args.starts + static_cast<size_t>(place.row) * args.groups;
  for (int group = chunk.begin; group < chunk.end; ++group, w += group_bytes, w_scale += kBlockN) {
    typename V::Int acc[ROWS][kVectors];
    sum_group<V, Codes>(acc, starts + group, args.groups, x + group * args.group_k, args.code_stride, w,
                        args.group_k);
    for (int v = 0; v < kVectors; ++v) {
      const typename V::Float scale = V::load_half(w_scale + v * V::kLanes);
      for (int r = 0; r < ROWS; ++r) {
        if constexpr (ONLY_SUMS) {
          const int n = place.block * kBlockN + place.column + v * V::kLanes;
          write_sums<V>(args, acc[r][v], place.row + r, group, n);
        } else {
          float* sum = partial + r * kBlockN + v * V::kLanes;
          V::store(sum, V::fma(V::to_float(acc[r][v]), scale, V::load(sum)));
        }
      }
    }
  }
}

// Calls the tile of exactly `rows` rows, or the largest.
template <class V, class Codes, bool ONLY_SUMS, int ROWS = V::kTileRows>
FPTQ_INLINE void multiply_rows(int rows, const MultiplyArgs& args, TilePlace place, Chunk chunk,
                               float* partial) {
  if (rows >= ROWS) {
    return multiply_tile<V, Codes, ONLY_SUMS, ROWS, V::kTileVectors>(args, place, chunk, partial);
  }
  if constexpr (ROWS > 1) multiply_rows<V, Codes, ONLY_SUMS, ROWS - 1>(rows, args, place, chunk, partial);
}

// Adds a chunk to the partial sums of `rows` rows of a block.
template <class V, class Codes, bool ONLY_SUMS>
FPTQ_INLINE void multiply_chunk(const MultiplyArgs& args, int row, int rows, int block, Chunk chunk,
                                float* partial) {
  constexpr int kTileN = V::kTileVectors * V::kLanes;
  static_assert(kBlockN % kTileN == 0, "tiles cover a block without remainder");
  if (rows == 1) {
    constexpr int kRowVectors = V::kRowVectors, kRowN = kRowVectors * V::kLanes;
    static_assert(kBlockN % kRowN == 0, "tiles cover a block without remainder");
    for (int column = 0; column < kBlockN; column += kRowN) {
      multiply_tile<V, Codes, ONLY_SUMS, 1, kRowVectors>(args, {row, block, column}, chunk, partial + column);
    }
    return;
  }
  for (int r = 0; r < rows; r += V::kTileRows) {
    for (int column = 0; column < kBlockN; column += kTileN) {
      multiply_rows<V, Codes, ONLY_SUMS>(rows - r, args, {row + r, block, column}, chunk,
                                         partial + r * kBlockN + column);
    }
  }
}

// The output of 32 channels of one row: sum * x_scale + bias, rounded once to the output type.
template <class V>
FPTQ_INLINE void write_row(const MultiplyArgs& args, int row, int block, const float* sums,
                           const float* bias) {
  const int count = smaller(kBlockN, args.n - block * kBlockN);
  const size_t offset = static_cast<size_t>(row) * args.n + static_cast<size_t>(block) * kBlockN;
  const typename V::Float x_scale = V::set(args.x_scales[row]);
  float line[kBlockN];
  uint16_t half_line[kBlockN];
  for (int c = 0; c < kBlockN; c += V::kLanes) {
    const typename V::Float sum = V::load(sums + c);
    const typename V::Float y =
        bias == nullptr ? V::multiply(sum, x_scale) : V::fma(sum, x_scale, V::load(bias + c));
    if (args.output_type == FPTQ_CPU_FLOAT16) {
      V::store_half(half_line + c, y);
    } else {
      V::store(line + c, y);
    }
  }
  if (args.output_type == FPTQ_CPU_FLOAT16) {
    memcpy(static_cast<uint16_t*>(args.y) + offset, half_line, static_cast<size_t>(count) * sizeof(uint16_t));
  } else {
    memcpy(static_cast<float*>(args.y) + offset, line, static_cast<size_t>(count) * sizeof(float));
  }
}

template <class V, bool ONLY_SUMS>
void multiply_block(const MultiplyArgs& args, int32_t block) {
  float bias[kBlockN] = {};
  if (args.bias != nullptr) {
    const int count = smaller(kBlockN, args.n - block * kBlockN);
    memcpy(bias, args.bias + static_cast<size_t>(block) * kBlockN,
           static_cast<size_t>(count) * sizeof(float));
  }
  alignas(FPTQ_CPU_ALIGNMENT) float partial[kChunkRows * kBlockN];
  alignas(FPTQ_CPU_ALIGNMENT) uint8_t wide[kChunkK / kStepK * WideCodes<V>::kBytes];
  const int group_steps = args.group_k / kStepK;
  const int chunk_groups = larger(1, kChunkK / args.group_k);
  for (int row = 0; row < args.m; row += kChunkRows) {
    const int rows = smaller(kChunkRows, args.m - row);
    // A group longer than a chunk is one row of many channels: it has no place in `wide`.
    const bool use_wide = rows > V::kTileRows && args.group_k <= kChunkK;
    memset(partial, 0, static_cast<size_t>(rows) * kBlockN * sizeof(float));
    for (int group = 0; group < args.groups; group += chunk_groups) {
      const size_t first_step = (static_cast<size_t>(block) * args.groups + group) * group_steps;
      Chunk chunk{group, smaller(group + chunk_groups, args.groups), args.w_codes + first_step * kStepBytes};
      if (use_wide) {
        widen_codes<V>(chunk.codes, (chunk.end - chunk.begin) * group_steps, wide);
        chunk.codes = wide;
        multiply_chunk<V, WideCodes<V>, ONLY_SUMS>(args, row, rows, block, chunk, partial);
      } else {
        multiply_chunk<V, PackedCodes<V>, ONLY_SUMS>(args, row, rows, block, chunk, partial);
      }
    }
    if constexpr (ONLY_SUMS) continue;
    for (int r = 0; r < rows; ++r) {
      write_row<V>(args, row + r, block, partial + r * kBlockN, args.bias == nullptr ? nullptr : bias);
    }
  }
}

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_VECTOR_KERNELS_H
