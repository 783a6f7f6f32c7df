// Sizes and checks of a problem, shared by the packer and the dispatcher.
#ifndef FPTQ_CPU_PROBLEM_H
#define FPTQ_CPU_PROBLEM_H

#include <algorithm>
#include <array>

#include "fptq/layout.h"
#include "kernels.h"

namespace fptq::cpu {

constexpr int32_t padded_k(int32_t k) { return FPTQ_ROUND_UP(k, kPaddingK); }
// Bytes from a row of activation codes to the next: an odd number of cache lines, so that the rows of a tile
// do not meet in the same sets of the first-level cache, as they would at K = 4096.
constexpr int64_t code_stride(int32_t k) {
  return (FPTQ_ROUND_UP(int64_t{k}, kCacheLine) / kCacheLine | 1) * kCacheLine;
}
constexpr int32_t blocks_of(int32_t n) { return FPTQ_ROUND_UP(n, kBlockN) / kBlockN; }
constexpr int32_t groups_of(int32_t k, int32_t group_size) { return group_size == 0 ? 1 : k / group_size; }

inline FptqStatus check_weight(int32_t n, int32_t k, int32_t group_size) {
  constexpr std::array<int32_t, FPTQ_NUM_GROUP_SIZES> kGroupSizes = FPTQ_GROUP_SIZES;
  static_assert(std::ranges::all_of(kGroupSizes, [](int32_t size) { return size % kPaddingK == 0; }),
                "only a row of one group may have padding");
  constexpr int32_t kMaxSize = 1 << 30;  // padding a size stays inside int32_t
  if (group_size != 0 && std::ranges::find(kGroupSizes, group_size) == kGroupSizes.end())
    return FPTQ_BAD_GROUP_SIZE;
  if (n < 1 || k < 1 || n > kMaxSize || k > kMaxSize) return FPTQ_BAD_SHAPE;
  if (group_size == 0 ? k > kMaxGroupK : k % group_size != 0) return FPTQ_BAD_SHAPE;
  return FPTQ_OK;
}

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_PROBLEM_H
