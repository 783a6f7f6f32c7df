/* INT8 quantization of an activation, static per tensor or dynamic per token: one thread block a row, one
 * pass over x. */
#ifndef FPTQ_SRC_QUANTIZE_ACTIVATION_CUH
#define FPTQ_SRC_QUANTIZE_ACTIVATION_CUH

#include "quantize_row.cuh"

namespace fptq {

struct QuantizeParams {
  RowSource source;
  int8_t* codes;     /* INT8 [m, padded k], row-major, padding 0 */
  float* scales;     /* FP32 [m] */
  int32_t* row_sums; /* INT32 [m], or null */
  int num_threads;
};

__global__ void __launch_bounds__(32 * kMaxWarps) quantize_activation_kernel(const QuantizeParams p) {
  const int row = block_id_x();
  int8_t* codes = p.codes + static_cast<size_t>(row) * p.source.padded_k;
  const RowScale result =
      quantize_row(p.source, row, p.num_threads, dynamic_shared(), p.row_sums != nullptr,
                   [&](int vector, uint2 words) { store_global<uint2>(codes + vector * kVector, words); });
  if (thread_id() != 0) return;
  store_global<float>(p.scales + row, result.scale);
  if (p.row_sums != nullptr) store_global<int32_t>(p.row_sums + row, result.row_sum);
}

}  // namespace fptq

#endif  // FPTQ_SRC_QUANTIZE_ACTIVATION_CUH
