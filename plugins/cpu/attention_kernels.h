/*
 * Attention over a KV cache, in FP32, over the vector types of vector_kernels.h.
 *
 * The cache of keys has 16 tokens side by side, [slots / 16][size][16]: then the scores of 16 tokens, and the mix of 16
 * channels of the values, are the same product of a few rows with rows of 16 columns, `multiply_panels`.
 *
 * The softmax runs over chunks of tokens, with the largest score so far taken out of the exponents (Milakov and
 * Gimelshein, arXiv 1805.02867). Chunks begin at the first token of the cache, so a row has the same bits in a prompt and
 * alone.
 */
#ifndef FPTQ_CPU_ATTENTION_KERNELS_H
#define FPTQ_CPU_ATTENTION_KERNELS_H

#include <cfloat>

#include "exp_kernel.h"
#include "half_kernels.h"

namespace fptq::cpu {

inline constexpr int kChunkTokens = 128;
static_assert(kChunkTokens % kPanel == 0, "chunks begin where panels do");

// Rows of `count` numbers, and `count` rows of panels of 16 columns.
struct Operands {
  const float* a;
  size_t a_stride;
  const float* b;
  size_t row_stride, panel_stride;
  int count;
};

// c [ROWS][PANELS * 16] (+)= a b
template <class V, int ROWS, int PANELS, bool ADD>
FPTQ_INLINE void multiply_tile_of(const Operands& of, float* c, size_t c_stride) {
  constexpr int kVectors = kPanel / V::kLanes;
  typename V::Float sums[ROWS][PANELS][kVectors];
  const auto at = [&](int r, int p, int v) { return c + r * c_stride + p * kPanel + v * V::kLanes; };
  for (int r = 0; r < ROWS; ++r) {
    for (int p = 0; p < PANELS; ++p) {
      for (int v = 0; v < kVectors; ++v) sums[r][p][v] = ADD ? V::load(at(r, p, v)) : V::set(0.0f);
    }
  }
  for (int i = 0; i < of.count; ++i) {
#pragma GCC unroll 8
    for (int p = 0; p < PANELS; ++p) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const typename V::Float b = V::load(of.b + i * of.row_stride + p * of.panel_stride + v * V::kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
          sums[r][p][v] = V::fma(V::set(of.a[r * of.a_stride + i]), b, sums[r][p][v]);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int p = 0; p < PANELS; ++p) {
      for (int v = 0; v < kVectors; ++v) V::store(at(r, p, v), sums[r][p][v]);
    }
  }
}

// As many panels at once as give eight independent sums.
template <class V, int ROWS, bool ADD>
FPTQ_INLINE void multiply_panels(Operands of, int panels, float* c, size_t c_stride) {
  constexpr int kSums = 8, kAtOnce = larger(1, kSums * V::kLanes / kPanel / ROWS);
  for (; panels >= kAtOnce; panels -= kAtOnce, of.b += kAtOnce * of.panel_stride, c += kAtOnce * kPanel) {
    multiply_tile_of<V, ROWS, kAtOnce, ADD>(of, c, c_stride);
  }
  for (; panels > 0; --panels, of.b += of.panel_stride, c += kPanel) {
    multiply_tile_of<V, ROWS, 1, ADD>(of, c, c_stride);
  }
}

// x [size] by the angles of a token, the halves of x paired, and by `scale`. Without angles x is only scaled.
template <class V>
void rotate(const FptqCpuAttention& args, const float* x, size_t token, float scale, float* to) {
  const int half = args.size / 2;
  if (args.cosines == nullptr) {
    for (int i = 0; i < args.size; ++i) to[i] = x[i] * scale;
    return;
  }
  const float *cosines = args.cosines + token * half, *sines = args.sines + token * half;
  for (int i = 0; i < half; ++i) {
    to[i] = (x[i] * cosines[i] - x[i + half] * sines[i]) * scale;
    to[i + half] = (x[i + half] * cosines[i] + x[i] * sines[i]) * scale;
  }
}

// Writes the new keys and values of head number `index` of [batch, kv_heads] into the cache.
template <class V>
void store_head(const FptqCpuAttention& args, int32_t index) {
  const size_t batch = static_cast<size_t>(index / args.kv_heads),
               head = static_cast<size_t>(index % args.kv_heads);
  const size_t cache = static_cast<size_t>(index) * args.slots * args.size;
  float key[kMaxHeadSize];
  for (int32_t i = 0; i < args.tokens; ++i) {
    const size_t token = batch * args.tokens + i, slot = static_cast<size_t>(args.past) + i;
    const size_t from = (token * args.kv_heads + head) * args.size;
    rotate<V>(args, args.k + from, token, 1.0f, key);
    float* panel = args.keys + cache + slot / kPanel * kPanel * args.size + slot % kPanel;
    for (int c = 0; c < args.size; ++c) panel[c * kPanel] = key[c];
    memcpy(args.values + cache + slot * args.size, args.v + from, args.size * sizeof(float));
  }
}

// The softmax of a row so far: what its exponents are relative to, and their sum.
template <class V>
struct Softmax {
  float top = -__builtin_inff(), sum = 0.0f;

  // Replaces `count` scores by their exponentials, and those from there to `padded` by 0. Returns what earlier ones have to
  // be multiplied with.
  float add(float* scores, int count, int padded) {
    for (int i = count; i < padded; ++i) scores[i] = -FLT_MAX;
    typename V::Float most = V::set(top);
    for (int i = 0; i < padded; i += V::kLanes) most = V::max(most, V::load(scores + i));
    float lanes[V::kLanes];
    V::store(lanes, most);
    const float before = top;
    for (const float lane : lanes) top = lane > top ? lane : top;
    typename V::Float total = V::set(0.0f);
    for (int i = 0; i < padded; i += V::kLanes) {
      const typename V::Float power = exp_of<V>(V::add(V::load(scores + i), V::set(-top)));
      V::store(scores + i, power);
      total = V::add(total, power);
    }
    for (int i = count; i < padded; ++i) scores[i] = 0.0f;
    const float factor = __builtin_expf(before - top);
    sum = sum * factor + sum_lanes<V>(total);
    return factor;
  }
};

// ROWS rows from `first` on, of one head of the cache; a row is a query head of a token, tokens first.
template <class V, int ROWS>
FPTQ_INLINE void attend_rows_of(const FptqCpuAttention& args, size_t batch, int32_t kv_head, int32_t first) {
  const int32_t group = args.heads / args.kv_heads;
  const size_t cache = (batch * args.kv_heads + kv_head) * args.slots * args.size;
  alignas(FPTQ_CPU_ALIGNMENT) float q[ROWS][kMaxHeadSize], mix[ROWS][kMaxHeadSize],
      scores[ROWS][kChunkTokens];
  Softmax<V> softmax[ROWS];
  size_t place[ROWS];  // of the row in [batch, tokens, heads * size]
  int32_t seen[ROWS];  // tokens of the cache
  for (int r = 0; r < ROWS; ++r) {
    const int32_t row = first + r;
    const size_t token = batch * args.tokens + row / group;
    place[r] = (token * args.heads + kv_head * group + row % group) * args.size;
    seen[r] = args.past + row / group + 1;
    rotate<V>(args, args.q + place[r], token, args.scale, q[r]);
    memset(mix[r], 0, args.size * sizeof(float));
  }
  for (int32_t start = 0; start < seen[ROWS - 1]; start += kChunkTokens) {
    const int tokens = smaller(kChunkTokens, seen[ROWS - 1] - start), panels = (tokens + kPanel - 1) / kPanel;
    const size_t from = cache + static_cast<size_t>(start) * args.size, size = static_cast<size_t>(args.size);
    const Operands keys{q[0], kMaxHeadSize, args.keys + from, kPanel, size * kPanel, args.size};
    multiply_panels<V, ROWS, false>(keys, panels, scores[0], kChunkTokens);
    for (int r = 0; r < ROWS; ++r) {
      const int count = larger(0, smaller(tokens, seen[r] - start));
      const typename V::Float factor = V::set(softmax[r].add(scores[r], count, panels * kPanel));
      for (int c = 0; c < args.size; c += V::kLanes)
        V::store(mix[r] + c, V::multiply(V::load(mix[r] + c), factor));
    }
    const Operands values{scores[0], kChunkTokens, args.values + from, size, kPanel, tokens};
    multiply_panels<V, ROWS, true>(values, args.size / kPanel, mix[0], kMaxHeadSize);
  }
  for (int r = 0; r < ROWS; ++r) {
    const typename V::Float sum = V::set(softmax[r].sum);
    for (int c = 0; c < args.size; c += V::kLanes)
      V::store(args.y + place[r] + c, V::divide(V::load(mix[r] + c), sum));
  }
}

template <class V>
void attend_rows(const FptqCpuAttention& args, int32_t head, int32_t first, int32_t count) {
  const size_t batch = static_cast<size_t>(head / args.kv_heads);
  const int32_t kv_head = head % args.kv_heads;
  for (; count >= 4; first += 4, count -= 4) attend_rows_of<V, 4>(args, batch, kv_head, first);
  for (; count >= 2; first += 2, count -= 2) attend_rows_of<V, 2>(args, batch, kv_head, first);
  if (count == 1) attend_rows_of<V, 1>(args, batch, kv_head, first);
}

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_ATTENTION_KERNELS_H
