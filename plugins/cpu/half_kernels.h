/* A linear with an FP16 weight, over the vector types of vector_kernels.h: the head of a language model. */
#ifndef FPTQ_CPU_HALF_KERNELS_H
#define FPTQ_CPU_HALF_KERNELS_H

#include "vector_kernels.h"

namespace fptq::cpu {

inline constexpr int kHalfRows = 4;    // rows of x that share a widened vector of weights
inline constexpr int kHalfChains = 4;  // independent sums of a row, which hide the latency of a multiply-add

template <class V>
FPTQ_INLINE float sum_lanes(typename V::Float value) {
  float lanes[V::kLanes];
  V::store(lanes, value);
#pragma GCC unroll 4
  for (int half = V::kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// ROWS rows of x, from x on, times one output channel w[k]; y: where the first row's result goes.
template <class V, int ROWS>
FPTQ_INLINE void half_dot(const HalfArgs& args, const float* x, const _Float16* w, float* y) {
  typename V::Float sums[ROWS][kHalfChains];
  for (auto& row : sums) {
    for (auto& sum : row) sum = V::set(0.0f);
  }
  const size_t stride = static_cast<size_t>(args.k);
  int k = 0;
  for (; k + kHalfChains * V::kLanes <= args.k; k += kHalfChains * V::kLanes) {
    // The weight is read once, from memory, and what the processor fetches ahead by itself ends with a page.
    __builtin_prefetch(w + k + kPrefetchBytes / 2);
#pragma GCC unroll 4
    for (int c = 0; c < kHalfChains; ++c) {
      const typename V::Float weight = V::load(w + k + c * V::kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        sums[r][c] = V::fma(V::load(x + r * stride + k + c * V::kLanes), weight, sums[r][c]);
      }
    }
  }
  for (; k < args.k; k += V::kLanes) {
    const typename V::Float weight = load_activation<V>(w, k, args.k);
    for (int r = 0; r < ROWS; ++r) {
      sums[r][0] = V::fma(load_activation<V>(x + r * stride, k, args.k), weight, sums[r][0]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    const typename V::Float first = V::add(sums[r][0], sums[r][1]), last = V::add(sums[r][2], sums[r][3]);
    y[r * static_cast<size_t>(args.n)] = sum_lanes<V>(V::add(first, last));
  }
}

template <class V>
void half_block(const HalfArgs& args, int32_t block) {
  const int n_end = smaller(args.n, (block + 1) * kBlockN);
  for (int n = block * kBlockN; n < n_end; ++n) {
    const _Float16* w = args.w + static_cast<size_t>(n) * args.k;
    int row = 0;
    for (; row + kHalfRows <= args.m; row += kHalfRows) {
      half_dot<V, kHalfRows>(args, args.x + static_cast<size_t>(row) * args.k, w,
                             args.y + static_cast<size_t>(row) * args.n + n);
    }
    for (; row < args.m; ++row) {
      half_dot<V, 1>(args, args.x + static_cast<size_t>(row) * args.k, w,
                     args.y + static_cast<size_t>(row) * args.n + n);
    }
  }
}

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_HALF_KERNELS_H
