/*
 * The boundary of the kernels: C linkage, raw device pointers, sizes, a stream, a status. No TensorRT or torch header is
 * reachable from here. Numeric contract: fptq_export/numerics.py.
 *
 *   y[m, n] = round_to_output( (sum over groups of (exact INT32 sum) * group_scale[g, n]) * a_scale[m] + bias[n] )
 */
#ifndef FPTQ_KERNELS_H
#define FPTQ_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "fptq/layout.h"
#include "fptq/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct CUstream_st* FptqStream;

typedef enum FptqOutputType { FPTQ_FLOAT16 = 0, FPTQ_BFLOAT16 = 1 } FptqOutputType;
typedef enum FptqScheme {
  FPTQ_PER_CHANNEL = 0, /* one scale an output channel */
  FPTQ_GROUP = 1,       /* one FP16 scale a group and channel */
  FPTQ_TWO_LEVEL = 2    /* integer scales a group, one FP32 scale a channel */
} FptqScheme;
typedef enum FptqActivationMode { FPTQ_STATIC = 0, FPTQ_PER_TOKEN = 1 } FptqActivationMode;

/* The problem. */
typedef struct FptqGemmDesc {
  int32_t m;             /* rows of the activation, >= 1 */
  int32_t n;             /* output channels, a multiple of 8 */
  int32_t k;             /* input channels, a multiple of group_size */
  int32_t group_size;    /* 128, 64, 32, 16; 0 is per channel */
  FptqScheme scheme;
  FptqActivationMode activation_mode;
  FptqOutputType output_type;
  int32_t has_bias;
} FptqGemmDesc;

typedef enum FptqKernel { FPTQ_KERNEL_GEMV = 0, FPTQ_KERNEL_GEMM = 1 } FptqKernel;

/* How to run it; made by fptqChooseConfig or taken from fptqCandidates, never by hand. */
typedef struct FptqGemmConfig {
  FptqKernel kernel;
  int32_t block_m, block_n, block_k; /* tile of a thread block */
  int32_t warp_m, warp_n;            /* tile of a warp */
  int32_t stages;                    /* of the cp.async pipeline */
  int32_t split_k;                   /* thread blocks that share a tile; partial sums are added in fixed order */
} FptqGemmConfig;

/* What the choice depends on besides the problem. */
typedef struct FptqDevice {
  int32_t compute_capability;   /* 80, 86, 87, 89, 90, 100, 103, 110, 120, 121 */
  int32_t multiprocessors;
  int32_t shared_memory_bytes;  /* most a block may opt in to */
} FptqDevice;

/* Pure host function: the best configuration for a problem on a device. */
FptqStatus fptqChooseConfig(const FptqGemmDesc* desc, const FptqDevice* device, FptqGemmConfig* config);

/* All sensible configurations, best first, at most `capacity`; *count is set. For TensorRT's tactics. */
FptqStatus fptqCandidates(const FptqGemmDesc* desc, const FptqDevice* device, FptqGemmConfig* configs, int32_t capacity,
                          int32_t* count);

/*
 * Writes a line for each configuration that was thought of: usable ones first, best first, then the rejected with the reason.
 * Returns the bytes the whole text needs with its final zero, or minus a FptqStatus; writes at most `capacity` bytes.
 */
int32_t fptqExplainConfigs(const FptqGemmDesc* desc, const FptqDevice* device, char* text, int32_t capacity);

/* Bytes of workspace the GEMM needs: the INT8 activation, its scales, and FP32 partial sums of split-K. */
size_t fptqWorkspaceBytes(const FptqGemmDesc* desc, const FptqGemmConfig* config);

/* Device pointers of one call. */
typedef struct FptqGemmArgs {
  const void* x;              /* FP16 or BF16 (output_type) [m, k], row-major, 16-byte aligned rows or not: any k */
  const void* weight_codes;   /* packed, FPTQ_PACKED_BYTES(n, k) bytes (layout.h) */
  const void* weight_scales;  /* FP16 [k / group_size][padded n]; FPTQ_TWO_LEVEL: uint8 pairs, same order */
  const float* channel_scales;/* FP32 [padded n]; FPTQ_TWO_LEVEL only, else null */
  const float* x_scale;       /* FP32 scalar on the device; FPTQ_STATIC only, else null */
  const void* bias;           /* output_type [n]; null when has_bias is 0 */
  void* y;                    /* output_type [m, n], row-major */
  void* workspace;            /* fptqWorkspaceBytes bytes, 16-byte aligned */
  size_t workspace_bytes;
} FptqGemmArgs;

/* Quantize x and multiply, on `stream`. Results are bit-identical from run to run for one configuration. */
FptqStatus fptqW4A8Linear(const FptqGemmDesc* desc, const FptqGemmConfig* config, const FptqGemmArgs* args,
                          FptqStream stream);

/* Quantize only: x [m, k] -> INT8 [m, padded k] (padding zero), FP32 scales [m] (per token) and INT32 row sums [m]. */
FptqStatus fptqQuantizeActivation(const FptqGemmDesc* desc, const void* x, const float* x_scale, int8_t* codes,
                                  float* scales, int32_t* row_sums, FptqStream stream);

#ifdef __cplusplus
}
#endif
#endif /* FPTQ_KERNELS_H */
