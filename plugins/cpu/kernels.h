/*
 * What the dispatcher hands to the kernels of one instruction set.
 *
 * The files of the instruction sets are compiled with their own -m flags. They include no header of the C++
 * library with code in it: the linker would keep one copy of an inline function, and a machine without
 * AVX-512 could meet the copy that uses it.
 */
#ifndef FPTQ_CPU_KERNELS_H
#define FPTQ_CPU_KERNELS_H

#include <cstddef>
#include <cstdint>

#include "attention_cpu.h"
#include "prologue_cpu.h"
#include "w4a8_cpu.h"

namespace fptq::cpu {

inline constexpr int kBlockN = 32;  // output channels of a block
inline constexpr int kStepK = 8;    // input channels of a step: both nibbles of four bytes
inline constexpr int kStepBytes = kBlockN * kStepK / 2;
inline constexpr int kPaddingK = 16;  // K is padded to a multiple of this: one store of AVX-512 codes
inline constexpr int kCacheLine = FPTQ_CPU_ALIGNMENT;
inline constexpr int kZeroCode = 8;  // the unsigned code of weight 0
inline constexpr int kMaxCode = 15;
inline constexpr int kMaxGroupK = 524288;
static_assert(int64_t{128} * (kMaxCode + kZeroCode) * kMaxGroupK < int64_t{1} << 31,
              "the start of an accumulator and all products of a group together stay inside INT32");

struct QuantizeArgs {
  const void* x;  // input_type [m, k]
  FptqCpuFloat input_type;
  bool per_token;
  float x_scale;            // of every row, unless per_token
  int32_t k, code_stride;   // code_stride: bytes from a row of codes to the next
  int32_t groups, group_k;  // group_k: input channels of a group, without padding
  int8_t* codes;            // [m][code_stride], zero between k and the padded k
  float* scales;            // [m]
  int32_t* starts;          // [m][groups]: -8 times the sum of the group's codes, which takes w + 8 back to w
};

struct MultiplyArgs {
  const int8_t* codes;    // [m][code_stride]
  const float* x_scales;  // [m]
  const int32_t* starts;  // [m][groups]
  int32_t m, n, code_stride;
  int32_t groups, group_k;   // group_k: with padding, a multiple of kStepK
  const uint8_t* w_codes;    // packed
  const uint16_t* w_scales;  // FP16, packed
  const float* bias;         // [n], or null
  FptqCpuFloat output_type;
  void* y;  // output_type [m, n]; of sum_block: INT32 [m][groups][n]
};

struct HalfArgs {
  const float* x;     // [m, k]
  const _Float16* w;  // [n, k]
  float* y;           // [m, n]
  int32_t m, n, k;
};

inline constexpr int kPanel = FPTQ_CPU_PANEL;
inline constexpr int kMaxHeadSize = FPTQ_CPU_MAX_HEAD_SIZE;

struct Kernels {
  void (*quantize_row)(const QuantizeArgs& args, int32_t row);
  // All rows x 32 output channels: the outputs, or the INT32 sums of the groups.
  void (*multiply_block)(const MultiplyArgs& args, int32_t block);
  void (*sum_block)(const MultiplyArgs& args, int32_t block);
  // All rows x 32 output channels of an FP16 weight.
  void (*half_block)(const HalfArgs& args, int32_t block);
  // Writes the new keys and values of a head of the cache, one of [batch, kv_heads].
  void (*store_head)(const FptqCpuAttention& args, int32_t head);
  // Rows first .. first + count - 1 of a head of the cache; a row is a query head of a token, tokens first.
  void (*attend_rows)(const FptqCpuAttention& args, int32_t head, int32_t first, int32_t count);
  void (*skip_norm_row)(const FptqCpuSkipNorm& args, int32_t row);
  void (*swi_glu_row)(const FptqCpuSwiGlu& args, int32_t row);
};

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512VnniKernels;

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_KERNELS_H
