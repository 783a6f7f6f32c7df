/* e^x over the vector types of vector_kernels.h. */
#ifndef FPTQ_CPU_EXP_KERNEL_H
#define FPTQ_CPU_EXP_KERNEL_H

#include "vector_kernels.h"

namespace fptq::cpu {

// e^x for x <= 0. x = n ln 2 + r with |r| <= ln 2 / 2, and e^r by its Taylor series: the first term left out is
// r^8 / 8! < 2^-27. ln 2 in two parts, of which the first has so few bits that its product with n is exact.
template <class V>
FPTQ_INLINE typename V::Float exp_of(typename V::Float x) {
  constexpr float kFactors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f};
  constexpr float kLowest = -87.0f, kLog2E = 1.44269504f, kHigh = 0.693359375f, kLow = -2.12194440e-4f;
  x = V::max(V::set(kLowest), x);  // a NaN, as the second operand, stays
  const typename V::Int n = V::round(V::multiply(x, V::set(kLog2E)));
  const typename V::Float turns = V::to_float(n);
  const typename V::Float r = V::fma(turns, V::set(-kLow), V::fma(turns, V::set(-kHigh), x));
  typename V::Float sum = V::set(1.0f / 5040);
#pragma GCC unroll 8
  for (const float factor : kFactors) sum = V::fma(sum, r, V::set(factor));
  return V::multiply(sum, V::power_of_two(n));
}

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_EXP_KERNEL_H
