/*
 * Quantization of one row by one thread block, shared by quantize_activation and the GEMV:
 *   code = clip(rint(x / scale), -128, 127), ties to even, division in FP32;  per token: scale = max(max|x|,
 * eps) / 127.
 */
#ifndef FPTQ_SRC_QUANTIZE_ROW_CUH
#define FPTQ_SRC_QUANTIZE_ROW_CUH

#include <cstdint>

#include "bounds.h"
#include "fptq/kernels.h"
#include "ptx_ops.h"
#include "scheme.cuh"

namespace fptq {

inline constexpr int kVector = 8; /* elements that a thread reads at once: 16 bytes */
inline constexpr int kCachedVectors =
    4; /* vectors a thread keeps between the two passes; further ones are read again */
inline constexpr int kMaxWarps = 32;
inline constexpr int kQuantizeScratchBytes = 2 * kMaxWarps * 4; /* shared memory that quantize_row uses */

/* The activation as the caller gives it. */
struct RowSource {
  const void* x;             /* FP16 or BF16 [m, k], row-major */
  const float* static_scale; /* FP32 scalar; null per token */
  int k;
  int padded_k; /* k rounded up to 64; codes there are 0 */
  bool bfloat16;
  bool aligned; /* every row starts at a multiple of 16 bytes */
};

struct Values {
  float v[kVector];
};

/* Elements 8 * vector .. + 7 of a row, as raw 16-bit values; zeros past k. */
__device__ __forceinline__ uint4 load_vector(const RowSource& source, int row, int vector) {
  const int first = vector * kVector;
  const uint16_t* element =
      static_cast<const uint16_t*>(source.x) + static_cast<size_t>(row) * source.k + first;
  if (source.aligned && first + kVector <= source.k) return load_global_constant<uint4>(element);
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (first + i < source.k) {
      words[i / 2] |= static_cast<uint32_t>(load_global_constant<uint16_t>(element + i)) << (16 * (i % 2));
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

__device__ __forceinline__ Values values_from_raw(uint4 raw, bool bfloat16) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  Values values;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const uint16_t bits = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    values.v[i] = bfloat16 ? float_from_bfloat16(bits) : float_from_half(bits);
  }
  return values;
}

/* Largest |x| as FP32 bits: for values that are not negative the bits order as the values do, and NaN is
 * above infinity. */
__device__ __forceinline__ uint32_t absmax_bits(const Values& values) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const uint32_t bits = bits_from_float(values.v[i]) & 0x7FFFFFFFu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

/* A NaN becomes -128; per token its scale is NaN, and so is every output of the row. */
__device__ __forceinline__ int code_from_value(float value, float scale) {
  const float rounded = round_to_integer(divide_rn(value, scale));
  const float low = rounded > kMinCode ? rounded : kMinCode;
  return static_cast<int>(low < kMaxCode ? low : kMaxCode);
}

/* Eight codes as two words, and their sum. */
struct Codes {
  uint2 words;
  int sum;
};
__device__ __forceinline__ Codes codes_from_values(const Values& values, float scale) {
  uint32_t words[2] = {0, 0};
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const int code = code_from_value(values.v[i], scale);
    sum += code;
    words[i / 4] |= (static_cast<uint32_t>(code) & 0xFFu) << (8 * (i % 4));
  }
  return {{words[0], words[1]}, sum};
}

/* Combines one value of every thread; all threads get the result. `scratch`: kMaxWarps words of shared
 * memory. */
template <typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T value, T* scratch, int num_threads, T neutral, Combine combine) {
  const int lane = thread_id() % 32;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
  if (lane == 0) store_shared<T>(scratch + thread_id() / 32, value);
  sync_block();
  value = lane < num_threads / 32 ? load_shared<T>(scratch + lane) : neutral;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
  return value;
}

/*
 * Quantizes row `row` with all threads of the block. store(vector, words) receives the codes of elements 8 *
 * vector .. + 7. The row sum is computed when `wants_row_sum`. `scratch`: kQuantizeScratchBytes of shared
 * memory, used by this call only.
 */
template <typename Store>
__device__ __forceinline__ RowScale quantize_row(const RowSource& source, int row, int num_threads,
                                                 unsigned char* scratch, bool wants_row_sum, Store store) {
  const int num_vectors = source.padded_k / kVector;
  uint4 cached[kCachedVectors];
#pragma unroll
  for (int i = 0; i < kCachedVectors; ++i) {
    const int vector = thread_id() + i * num_threads;
    cached[i] = vector < num_vectors ? load_vector(source, row, vector) : uint4{0, 0, 0, 0};
  }

  float scale;
  if (source.static_scale != nullptr) {
    scale = load_global_constant<float>(source.static_scale);
  } else {
    uint32_t largest = 0;
    const auto larger = [](uint32_t a, uint32_t b) { return a > b ? a : b; };
#pragma unroll
    for (int i = 0; i < kCachedVectors; ++i) {
      largest = larger(largest, absmax_bits(values_from_raw(cached[i], source.bfloat16)));
    }
    for (int vector = thread_id() + kCachedVectors * num_threads; vector < num_vectors;
         vector += num_threads) {
      largest =
          larger(largest, absmax_bits(values_from_raw(load_vector(source, row, vector), source.bfloat16)));
    }
    largest = block_reduce(largest, reinterpret_cast<uint32_t*>(scratch), num_threads, 0u, larger);
    const float absmax = float_from_bits(largest);
    scale = divide_rn(absmax < kPerTokenEps ? kPerTokenEps : absmax, kMaxCode);
  }

  int row_sum = 0;
  const auto quantize_vector = [&](uint4 raw, int vector) {
    const Codes codes = codes_from_values(values_from_raw(raw, source.bfloat16), scale);
    row_sum += codes.sum;
    store(vector, codes.words);
  };
#pragma unroll
  for (int i = 0; i < kCachedVectors; ++i) {
    const int vector = thread_id() + i * num_threads;
    if (vector < num_vectors) quantize_vector(cached[i], vector);
  }
  for (int vector = thread_id() + kCachedVectors * num_threads; vector < num_vectors; vector += num_threads) {
    quantize_vector(load_vector(source, row, vector), vector);
  }
  if (wants_row_sum) {
    const auto add = [](int a, int b) { return a + b; };
    row_sum = block_reduce(row_sum, reinterpret_cast<int*>(scratch) + kMaxWarps, num_threads, 0, add);
  }
  return {scale, row_sum};
}

}  // namespace fptq

#endif  // FPTQ_SRC_QUANTIZE_ROW_CUH
