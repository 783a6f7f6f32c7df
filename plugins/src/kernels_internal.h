/* What the host code of the kernels shares: one launcher a kernel, called by w4a8_linear.cpp with checked
 * arguments. */
#ifndef FPTQ_SRC_KERNELS_INTERNAL_H
#define FPTQ_SRC_KERNELS_INTERNAL_H

#include "fptq/kernels.h"

namespace fptq {

/* The parts of the workspace; pointers into it, or null where a part is not needed. */
struct Workspace {
  int8_t* codes;     /* INT8 [m, padded k] */
  float* scales;     /* FP32 [m] */
  int32_t* row_sums; /* INT32 [m]; two_level only */
  void* partials;    /* FP32 (FPTQ_GROUP) or INT32 [split_k][m][padded n]; split-K only */
};

FptqStatus launch_quantize(const FptqGemmDesc& desc, const void* x, const float* x_scale, int8_t* codes,
                           float* scales, int32_t* row_sums, FptqStream stream);
FptqStatus launch_gemm(const FptqGemmDesc& desc, const FptqGemmConfig& config, const FptqGemmArgs& args,
                       const Workspace& workspace, FptqStream stream);
FptqStatus launch_gemv(const FptqGemmDesc& desc, const FptqGemmArgs& args, FptqStream stream);

/* Dynamic shared memory of a block. */
size_t gemm_shared_bytes(const FptqGemmDesc& desc, const FptqGemmConfig& config);
size_t gemv_shared_bytes(const FptqGemmDesc& desc);

/* Rows start at multiples of 16 bytes. */
bool rows_are_aligned(const FptqGemmDesc& desc, const void* x);

}  // namespace fptq

#endif  // FPTQ_SRC_KERNELS_INTERNAL_H
