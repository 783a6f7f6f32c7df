/*
 * What differs between the scale schemes: how INT4 codes become the B operand, when sums are folded, and how
 * a finished sum becomes an output. Everything else in the kernels is common.
 */
#ifndef FPTQ_SRC_SCHEME_CUH
#define FPTQ_SRC_SCHEME_CUH

#include <cstdint>
#include <type_traits>

#include "bounds.h"
#include "fptq/kernels.h"
#include "fptq/layout.h"
#include "ptx_ops.h"

namespace fptq {

/*
 * FP32 1.5 * 2^23: adding an integer of at most 22 bits to these bits gives the float 12582912 + integer. So
 * the tensor core's INT32 sum starts at kMagicBits, is read as FP32 for free, and one subtraction gives the
 * exact sum: no conversion instruction.
 */
inline constexpr int kMagicBits = 0x4B400000;
inline constexpr float kMagicFloat = 12582912.0f;

/* Weights are used as 16 * w: the code stays in the high nibble, which is its sign-extended value without
 * further work. */
inline constexpr float kInverseCodeFactor = 1.0f / 16.0f;
inline constexpr int kCodeShift = 4;

/* Offset that keeps the two_level operand unsigned; taken out once with the row sum of the activation. */
inline constexpr int kTwoLevelOffset = 128;

template <FptqScheme kKind_, int kGroupSize_>
struct Scheme {
  static constexpr FptqScheme kKind = kKind_;
  static constexpr int kGroupSize = kGroupSize_; /* 0: per channel */
  static constexpr bool kFolds = kKind == FPTQ_GROUP;
  static constexpr bool kTwoLevel = kKind == FPTQ_TWO_LEVEL;
  static constexpr bool kHasGroups = kGroupSize > 0;
  /* A k tile of 64 holds several groups, or a group spans several k tiles; one of the two is 1. */
  static constexpr int kGroupsPerTile = kHasGroups && kGroupSize < FPTQ_TILE_K ? FPTQ_TILE_K / kGroupSize : 1;
  static constexpr int kTilesPerGroup = kGroupSize > FPTQ_TILE_K ? kGroupSize / FPTQ_TILE_K : 1;
  using Accumulator = std::conditional_t<kFolds, float, int>; /* of the sum over all k */

  static_assert(kHasGroups == (kKind != FPTQ_PER_CHANNEL), "only the per-channel scheme has no groups");
  static_assert(
      !kFolds || kGroupSize * 128 * 128 < kMagicFloatRange,
      "a group's largest sum (all codes -8 as -128, all activations -128) must fit the magic float");

  /* Whether the GEMM copies scales with the k tile at `phase` within its group: where it first needs them. */
  __device__ static constexpr bool loads_scales(int phase) {
    return kTwoLevel ? phase == 0 : kFolds && phase == kTilesPerGroup - 1;
  }
};

/* The 4 codes in the low, or the high, nibbles of a packed word, as INT8 16 * w. */
__device__ __forceinline__ uint32_t low_codes_times_16(uint32_t word) {
  return (word << kCodeShift) & 0xF0F0F0F0u;
}
__device__ __forceinline__ uint32_t high_codes_times_16(uint32_t word) { return word & 0xF0F0F0F0u; }

/* A two_level scale pair (uint8 s1, then uint8 a), ready for four weights at once. */
struct TwoLevelScale {
  uint32_t factor; /* s1 */
  uint32_t offset; /* a in each of the four bytes */
};
/* The pair in the low (kHalf 0) or high 16 bits of a word. */
template <int kHalf>
__device__ __forceinline__ TwoLevelScale two_level_from_pair(uint32_t word) {
  return {extract_byte<2 * kHalf>(word), replicate_byte<2 * kHalf + 1>(word)};
}
/* u * s1 + a in each byte. No byte carries into the next: the packer keeps 15 * s1 + a <= 255. */
__device__ __forceinline__ uint32_t low_codes_two_level(uint32_t word, TwoLevelScale scale) {
  return (word & 0x0F0F0F0Fu) * scale.factor + scale.offset;
}
__device__ __forceinline__ uint32_t high_codes_two_level(uint32_t word, TwoLevelScale scale) {
  return ((word >> 4) & 0x0F0F0F0Fu) * scale.factor + scale.offset;
}

/* Where results go and what they are multiplied with. */
struct Output {
  const void* weight_scales;   /* FP16 [padded n]; per channel only */
  const float* channel_scales; /* FP32 [padded n]; two_level only */
  const void* bias;            /* FP16 or BF16 [n], or null */
  void* y;                     /* FP16 or BF16 [m, n], row-major */
  int n;
  bool bfloat16;
};

/* What quantization knows about a row of the activation. */
struct RowScale {
  float scale;
  int row_sum; /* of the INT8 codes; two_level only */
};

__device__ __forceinline__ float load_element(const void* array, size_t index, bool bfloat16) {
  const uint16_t bits = load_global_constant<uint16_t>(static_cast<const uint16_t*>(array) + index);
  return bfloat16 ? float_from_bfloat16(bits) : float_from_half(bits);
}

/* Partial sums are stored as 32 bits whatever their type. */
template <typename Accumulator>
__device__ __forceinline__ Accumulator accumulator_from_bits(uint32_t bits) {
  if constexpr (std::is_same_v<Accumulator, float>) {
    return float_from_bits(bits);
  } else {
    return static_cast<int>(bits);
  }
}
template <typename Accumulator>
__device__ __forceinline__ uint32_t bits_from_accumulator(Accumulator sum) {
  if constexpr (std::is_same_v<Accumulator, float>) {
    return bits_from_float(sum);
  } else {
    return static_cast<uint32_t>(sum);
  }
}

/* One output before rounding: sum * scales * activation scale + bias, in FP32. */
template <FptqScheme kKind, typename Accumulator>
__device__ __forceinline__ float finish(const Output& out, int row, int column, Accumulator sum, RowScale x) {
  float value;
  float x_scale = x.scale;
  if constexpr (kKind == FPTQ_TWO_LEVEL) {
    const int exact = sum - kTwoLevelOffset * x.row_sum;
    trace_group_sum(row, column, 0, exact);
    value = float_from_int(exact) * load_global_constant<float>(out.channel_scales + column);
  } else if constexpr (kKind == FPTQ_PER_CHANNEL) {
    trace_group_sum(row, column, 0, sum >> kCodeShift);
    value = float_from_int(sum) * load_element(out.weight_scales, column, false);
    x_scale *= kInverseCodeFactor;
  } else {
    value = sum;
    x_scale *= kInverseCodeFactor;
  }
  const float bias = out.bias != nullptr ? load_element(out.bias, column, out.bfloat16) : 0.0f;
  return fma_rn(value, x_scale, bias);
}

/* Outputs at `column` (even) and column + 1, rounded once and stored together. */
template <FptqScheme kKind, typename Accumulator>
__device__ __forceinline__ void finish_pair(const Output& out, int row, int column, Accumulator sum0,
                                            Accumulator sum1, RowScale x) {
  const float y0 = finish<kKind>(out, row, column, sum0, x);
  const float y1 = finish<kKind>(out, row, column + 1, sum1, x);
  const uint32_t low = out.bfloat16 ? bfloat16_from_float(y0) : half_from_float(y0);
  const uint32_t high = out.bfloat16 ? bfloat16_from_float(y1) : half_from_float(y1);
  store_global<uint32_t>(static_cast<uint16_t*>(out.y) + static_cast<size_t>(row) * out.n + column,
                         low | (high << 16));
}

}  // namespace fptq

#endif  // FPTQ_SRC_SCHEME_CUH
