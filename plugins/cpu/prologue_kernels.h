/* A row of what stands before a linear, over the vector types of vector_kernels.h. */
#ifndef FPTQ_CPU_PROLOGUE_KERNELS_H
#define FPTQ_CPU_PROLOGUE_KERNELS_H

#include "exp_kernel.h"
#include "half_kernels.h"

namespace fptq::cpu {

// kLanes values to a row from channel k on, as far as there are any.
template <class V>
FPTQ_INLINE void store_row(float* row, int k, int k_end, typename V::Float values) {
  if (k + V::kLanes <= k_end) return V::store(row + k, values);
  float lanes[V::kLanes];
  V::store(lanes, values);
  memcpy(row + k, lanes, static_cast<size_t>(k_end - k) * sizeof(float));
}

template <class V>
void skip_norm_row(const FptqCpuSkipNorm& args, int32_t row) {
  const size_t offset = static_cast<size_t>(row) * args.k;
  typename V::Float squares = V::set(0.0f);
  for (int k = 0; k < args.k; k += V::kLanes) {
    const typename V::Float sum = V::add(load_activation<V>(args.x + offset, k, args.k),
                                         load_activation<V>(args.skip + offset, k, args.k));
    store_row<V>(args.sum + offset, k, args.k, sum);
    squares = V::fma(sum, sum, squares);
  }
  const float mean = sum_lanes<V>(squares) / static_cast<float>(args.k);
  const typename V::Float factor = V::set(1.0f / __builtin_sqrtf(mean + args.epsilon));
  for (int k = 0; k < args.k; k += V::kLanes) {
    const typename V::Float unit = V::multiply(load_activation<V>(args.sum + offset, k, args.k), factor);
    store_row<V>(args.y + offset, k, args.k, V::multiply(unit, load_activation<V>(args.gamma, k, args.k)));
  }
}

// gate / (1 + e^-gate) is gate e^gate / (1 + e^gate) for a negative gate: no exponent is above 0.
template <class V>
void swi_glu_row(const FptqCpuSwiGlu& args, int32_t row) {
  const size_t offset = static_cast<size_t>(row) * args.k;
  const typename V::Float one = V::set(1.0f), none = V::set(0.0f), minus = V::set(-1.0f);
  for (int k = 0; k < args.k; k += V::kLanes) {
    const typename V::Float gate = load_activation<V>(args.gate + offset, k, args.k);
    const typename V::Float below = V::min(none, gate), above = V::max(none, gate);  // a NaN stays in both
    const typename V::Float power = exp_of<V>(V::fma(above, minus, below));          // e^-|gate|
    const typename V::Float silu = V::divide(V::fma(below, power, above), V::add(one, power));
    store_row<V>(args.y + offset, k, args.k,
                 V::multiply(silu, load_activation<V>(args.up + offset, k, args.k)));
  }
}

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_PROLOGUE_KERNELS_H
