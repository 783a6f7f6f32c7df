/* What a configuration would take on a device: orders candidates, and predicts no time exactly. */
#ifndef FPTQ_SRC_MODELLED_TIME_H
#define FPTQ_SRC_MODELLED_TIME_H

#include "fptq/kernels.h"

namespace fptq {

double gemv_microseconds(const FptqGemmDesc& desc, const FptqDevice& device);
double gemm_microseconds(const FptqGemmDesc& desc, const FptqDevice& device, const FptqGemmConfig& config);

inline int ceil_divide(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
inline int k_tiles(const FptqGemmDesc& desc) { return FPTQ_PADDED_K(desc.k) / FPTQ_TILE_K; }

}  // namespace fptq

#endif  // FPTQ_SRC_MODELLED_TIME_H
