#include <algorithm>

#include "kernels_internal.h"
#include "launch.h"
#include "quantize_activation.cuh"

namespace fptq {

bool rows_are_aligned(const FptqGemmDesc& desc, const void* x) {
  return desc.k % kVector == 0 && reinterpret_cast<uintptr_t>(x) % FPTQ_POINTER_ALIGNMENT == 0;
}

FptqStatus launch_quantize(const FptqGemmDesc& desc, const void* x, const float* x_scale, int8_t* codes,
                           float* scales, int32_t* row_sums, FptqStream stream) {
  const int padded_k = FPTQ_PADDED_K(desc.k);
  /* One vector a thread where a block is large enough: at small M latency counts, at large M the rows fill
   * the device. */
  const int num_threads = std::min(FPTQ_ROUND_UP(padded_k / kVector, 32), 32 * kMaxWarps);
  const bool bfloat16 = desc.output_type == FPTQ_BFLOAT16;
  const QuantizeParams params = {{x, x_scale, desc.k, padded_k, bfloat16, rows_are_aligned(desc, x)},
                                 codes,
                                 scales,
                                 row_sums,
                                 num_threads};
  return launch(quantize_activation_kernel, static_cast<uint32_t>(desc.m), 1,
                static_cast<uint32_t>(num_threads), kQuantizeScratchBytes, stream, params);
}

}  // namespace fptq
