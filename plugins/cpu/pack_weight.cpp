// From codes [N, K] to the layout of w4a8_cpu.h.
#include <cstring>

#include "problem.h"

namespace fptq::cpu {
namespace {

// The byte that holds two codes of channel n, from input channels k and k + 4; zero outside of the weight.
uint8_t packed_byte(const int8_t* codes, int32_t n, int32_t k, int32_t row, int32_t column) {
  const auto nibble = [&](int32_t at) {
    const int code = row < n && at < k ? codes[static_cast<size_t>(row) * k + at] : 0;
    return (code + kZeroCode) & kMaxCode;
  };
  return static_cast<uint8_t>(nibble(column) | nibble(column + kStepK / 2) << 4);
}

void pack_codes(int32_t n, int32_t k, const int8_t* codes, uint8_t* packed) {
  const int32_t steps = padded_k(k) / kStepK;
  for (int32_t block = 0; block < blocks_of(n); ++block) {
    for (int32_t step = 0; step < steps; ++step) {
      for (int32_t i = 0; i < kStepBytes; ++i) {
        *packed++ = packed_byte(codes, n, k, block * kBlockN + i / 4, step * kStepK + i % 4);
      }
    }
  }
}

void pack_scales(int32_t n, int32_t groups, const uint16_t* scales, uint16_t* packed) {
  for (int32_t block = 0; block < blocks_of(n); ++block) {
    for (int32_t group = 0; group < groups; ++group) {
      for (int32_t row = block * kBlockN; row < (block + 1) * kBlockN; ++row) {
        *packed++ = row < n ? scales[static_cast<size_t>(row) * groups + group] : uint16_t{0};
      }
    }
  }
}

}  // namespace
}  // namespace fptq::cpu

extern "C" FptqStatus fptqCpuPackWeight(int32_t n, int32_t k, int32_t group_size, const int8_t* codes,
                                        const void* scales, uint8_t* packed_codes, void* packed_scales) {
  using namespace fptq::cpu;
  if (codes == nullptr || scales == nullptr || packed_codes == nullptr || packed_scales == nullptr) {
    return FPTQ_NULL_POINTER;
  }
  if (const FptqStatus status = check_weight(n, k, group_size); status != FPTQ_OK) return status;
  pack_codes(n, k, codes, packed_codes);
  pack_scales(n, groups_of(k, group_size), static_cast<const uint16_t*>(scales),
              static_cast<uint16_t*>(packed_scales));
  return FPTQ_OK;
}
