/* The second kernel of split-K. */
#ifndef FPTQ_SRC_SPLIT_K_REDUCE_CUH
#define FPTQ_SRC_SPLIT_K_REDUCE_CUH

#include "ptx_ops.h"
#include "scheme.cuh"

namespace fptq {

/* Adds the partial sums of split-K in the order of k, whatever block finished first, and finishes the
 * outputs. */
struct ReduceParams {
  const uint32_t* partials; /* Accumulator [split_k][m][padded_n] */
  const float* row_scales;  /* FP32 [m] */
  const int32_t* row_sums;  /* INT32 [m]; two_level only */
  Output out;
  int m;
  int padded_n;
  int split_k;
};

inline constexpr int kReduceThreads = 128;

template <FptqScheme kKind>
__global__ void __launch_bounds__(kReduceThreads) split_k_reduce_kernel(const ReduceParams p) {
  const int row = block_id_x();
  const int column = (block_id_y() * kReduceThreads + thread_id()) * 2;
  if (column >= p.out.n) return;
  const size_t stride = static_cast<size_t>(p.m) * p.padded_n;
  const uint32_t* partial = p.partials + static_cast<size_t>(row) * p.padded_n + column;
  RowScale x = {load_global_constant<float>(p.row_scales + row), 0};
  if constexpr (kKind == FPTQ_TWO_LEVEL) x.row_sum = load_global_constant<int32_t>(p.row_sums + row);
  using Accumulator = std::conditional_t<kKind == FPTQ_GROUP, float, int>;
  Accumulator sum0 = 0, sum1 = 0;
  for (int split = 0; split < p.split_k; ++split) {
    const uint2 bits = load_global_constant<uint2>(partial + split * stride);
    sum0 += accumulator_from_bits<Accumulator>(bits.x);
    sum1 += accumulator_from_bits<Accumulator>(bits.y);
  }
  finish_pair<kKind>(p.out, row, column, sum0, sum1, x);
}

}  // namespace fptq

#endif  // FPTQ_SRC_SPLIT_K_REDUCE_CUH
