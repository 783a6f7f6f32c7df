/* Bounds that make the integer arithmetic exact, each with its reason. */
#ifndef FPTQ_SRC_BOUNDS_H
#define FPTQ_SRC_BOUNDS_H

#include <cstdint>

namespace fptq {

/* Integers that FP32 1.5 * 2^23 + i represents exactly: |i| < 2^22. */
inline constexpr int kMagicFloatRange = 1 << 22;

/* Largest K accepted: the INT32 sums over all of K below may not overflow. */
inline constexpr int64_t kMaxK = 65536;
static_assert(kMaxK * 128 * 128 < INT64_C(1) << 31,
              "per channel: |16 w| <= 128 times |x| <= 128 must not overflow");
static_assert(kMaxK * 255 * 128 < INT64_C(1) << 31,
              "two_level: u8 weights <= 255 times |x| <= 128 must not overflow");

/* Smallest absmax a token is given; as PER_TOKEN_EPS of fptq_export/numerics.py. */
inline constexpr float kPerTokenEps = 1e-6f;
inline constexpr float kMaxCode = 127.0f;
inline constexpr float kMinCode = -128.0f;

}  // namespace fptq

#endif  // FPTQ_SRC_BOUNDS_H
