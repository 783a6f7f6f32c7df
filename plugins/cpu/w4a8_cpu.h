/*
 * The W4A8 linear on x86 CPUs: C linkage, host pointers, sizes, a status. Numeric contract:
 * fptq_export/numerics.py.
 *
 *   sum[m, n] = sum over groups g of (exact INT32 sum) * group_scale[n, g]
 *   y[m, n] = round_to_output(sum[m, n] * x_scale[m] + bias[n])
 *
 * The FP32 sum runs over the groups in ascending order, one fused multiply-add a group. Therefore the result
 * has the same bits on every instruction set, for every number of threads, and for a row alone or in a batch.
 *
 * Packed weights: one layout for all instruction sets, made for vpdpbusd. Blocks of 32 output channels, each
 * a row of steps of 8 input channels; a step is 128 bytes, 4 bytes a channel. Byte j of channel n of a step
 * holds two unsigned codes w + 8: the low nibble is input channel 8 * step + j, the high nibble 8 * step + 4
 * + j. N is padded to a multiple of 32 and K to one of 16, with code 8 (zero). Scales: FP16 [N_padded / 32][K
 * / group_size][32], padding zero; a scale may be negative.
 */
#ifndef FPTQ_CPU_W4A8_CPU_H
#define FPTQ_CPU_W4A8_CPU_H

#include <stddef.h>
#include <stdint.h>

#include "fptq/kernels.h"
#include "fptq/status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FPTQ_CPU_ALIGNMENT 64 /* bytes, of packed codes and scales and of the workspace: a cache line */

typedef enum FptqCpuInstructionSet {
  FPTQ_CPU_SCALAR = 0,
  FPTQ_CPU_AVX2 = 1,       /* with FMA and F16C */
  FPTQ_CPU_AVX512_VNNI = 2 /* with AVX-512 F and BW */
} FptqCpuInstructionSet;

typedef enum FptqCpuFloat { FPTQ_CPU_FLOAT32 = 0, FPTQ_CPU_FLOAT16 = 1 } FptqCpuFloat;

typedef struct FptqCpuProblem {
  int32_t m;          /* rows of the activation, >= 1 */
  int32_t n;          /* output channels, >= 1 */
  int32_t k;          /* input channels, a multiple of group_size */
  int32_t group_size; /* 128, 64, 32, 16; 0 is per channel, with k up to 524288 */
  FptqActivationMode activation_mode;
  FptqCpuFloat input_type, output_type;
} FptqCpuProblem;

typedef struct FptqCpuArgs {
  const void* x;               /* input_type [m, k], row-major */
  float x_scale;               /* positive; FPTQ_STATIC only */
  const uint8_t* packed_codes; /* fptqCpuPackedCodeBytes bytes, 64-byte aligned */
  const void* packed_scales;   /* FP16, fptqCpuPackedScaleBytes bytes, 64-byte aligned */
  const float* bias;           /* [n], or null */
  void* y;         /* output_type [m, n], row-major; fptqCpuGroupSums: INT32 [m, k / group_size, n] */
  void* workspace; /* fptqCpuWorkspaceBytes bytes, 64-byte aligned */
  size_t workspace_bytes;
} FptqCpuArgs;

/* Threads of the caller: `run` calls work(data, i) for every i < count, in any order and on any threads, and returns when
 * all calls have. */
typedef struct FptqCpuPool {
  void* context;
  void (*run)(void* context, size_t count, void (*work)(void* data, size_t index), void* data);
} FptqCpuPool;

/* One of several weights that are multiplied with the same activation. */
typedef struct FptqCpuPart {
  int32_t n;
  const uint8_t* packed_codes; /* as in FptqCpuArgs */
  const void* packed_scales;
  void* y; /* output_type [m, n], row-major */
} FptqCpuPart;

/* 1 where this machine and its system run the instruction set, else 0. */
int32_t fptqCpuSupports(FptqCpuInstructionSet instruction_set);

size_t fptqCpuPackedCodeBytes(int32_t n, int32_t k);
size_t fptqCpuPackedScaleBytes(int32_t n, int32_t k, int32_t group_size);
size_t fptqCpuWorkspaceBytes(const FptqCpuProblem* problem);

/* codes: INT8 [n, k] with values in [-8, 7] (others lose bits); scales: FP16 [n, k / group_size]. */
FptqStatus fptqCpuPackWeight(int32_t n, int32_t k, int32_t group_size, const int8_t* codes,
                             const void* scales, uint8_t* packed_codes, void* packed_scales);

/*
 * Quantize the activation: INT8 codes [m, k] and FP32 scales [m]. Uses x, x_scale and the workspace of
 * `args`. A row with a NaN or an infinity has a scale that is not finite per token. FPTQ_STATIC clips
 * infinities and makes a NaN code -128, because no code can say it.
 */
FptqStatus fptqCpuQuantizeActivation(const FptqCpuProblem* problem, FptqCpuInstructionSet instruction_set,
                                     int32_t threads, const FptqCpuArgs* args, int8_t* codes, float* scales);

/* Quantize x and multiply. FPTQ_UNSUPPORTED_DEVICE where the machine lacks the instruction set. */
FptqStatus fptqCpuW4A8Linear(const FptqCpuProblem* problem, FptqCpuInstructionSet instruction_set,
                             int32_t threads, const FptqCpuArgs* args);

/* As fptqCpuW4A8Linear for each part, on the threads of the caller; x is quantized once. n of the problem, and the weight,
 * the bias and `y` of `args`, are not used. */
FptqStatus fptqCpuW4A8Linears(const FptqCpuProblem* problem, FptqCpuInstructionSet instruction_set,
                              const FptqCpuPool* pool, const FptqCpuArgs* args, const FptqCpuPart* parts,
                              int32_t part_count);

/* y[m, n] = x[m, k] w[n, k]^T, with w in FP16, widened where it is read, and x, y and the sums in FP32. The order of a
 * sum depends on the instruction set, and on nothing else. */
FptqStatus fptqCpuHalfLinear(int32_t m, int32_t n, int32_t k, FptqCpuInstructionSet instruction_set,
                             const FptqCpuPool* pool, const float* x, const void* w, float* y);

/* As fptqCpuW4A8Linear, stopping at the INT32 sums of the groups, which go to `y`. */
FptqStatus fptqCpuGroupSums(const FptqCpuProblem* problem, FptqCpuInstructionSet instruction_set,
                            int32_t threads, const FptqCpuArgs* args);

#ifdef __cplusplus
}
#endif
#endif /* FPTQ_CPU_W4A8_CPU_H */
