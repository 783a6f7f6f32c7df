// The kernels in plain C++, for machines without AVX2 and as the plainest of the three to read.
#include "attention_kernels.h"
#include "half_kernels.h"
#include "prologue_kernels.h"
#include "vector_kernels.h"

namespace fptq::cpu {
namespace {

struct Scalar {
  using Float = float;
  using Int = int32_t;
  using Bytes = uint32_t;
  using Partial = int32_t;
  static constexpr int kLanes = 1;
  static constexpr int kTileRows = 4;
  static constexpr int kTileVectors = 8;
  static constexpr int kRowVectors = 8;
  static constexpr int kTwoChainRows = 0;
  static constexpr int kFlushK = 0;

  static Float set(float value) { return value; }
  static Int set(int32_t value) { return value; }
  static Float load(const float* values) { return *values; }
  static Float load(const _Float16* values) { return static_cast<float>(*values); }
  static Float load_half(const uint16_t* values) {
    _Float16 half;
    memcpy(&half, values, sizeof half);
    return static_cast<float>(half);
  }
  static void store(float* to, Float value) { *to = value; }
  static void store(int32_t* to, Int value) { *to = value; }
  static void store_half(uint16_t* to, Float value) {
    const _Float16 half = static_cast<_Float16>(value);
    memcpy(to, &half, sizeof half);
  }
  static void store_codes(int8_t* to, Int value) { *to = static_cast<int8_t>(value); }

  static Float divide(Float a, Float b) { return a / b; }
  static Float multiply(Float a, Float b) { return a * b; }
  static Float fma(Float a, Float b, Float c) { return __builtin_fmaf(a, b, c); }
  // With a NaN the second operand is the result, as with vmaxps and vminps.
  static Float max(Float a, Float b) { return a > b ? a : b; }
  static Float min(Float a, Float b) { return a < b ? a : b; }
  static Int round(Float value) { return static_cast<Int>(__builtin_rintf(value)); }
  static Float to_float(Int value) { return static_cast<float>(value); }
  static Float power_of_two(Int n) {
    const Int bits = (n + 127) << 23;
    Float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }

  static Int add(Int a, Int b) { return a + b; }
  static Float add(Float a, Float b) { return a + b; }
  static Int max_magnitude(Int so_far, Float value) {
    Int bits;
    memcpy(&bits, &value, sizeof bits);
    bits &= 0x7FFFFFFF;
    return bits > so_far ? bits : so_far;
  }
  static int32_t reduce_add(Int value) { return value; }
  static int32_t reduce_max(Int value) { return value; }

  static Bytes load_bytes(const uint8_t* bytes) {
    Bytes value;
    memcpy(&value, bytes, sizeof value);
    return value;
  }
  static void store_bytes(uint8_t* to, Bytes value) { memcpy(to, &value, sizeof value); }
  static Bytes repeat(const int8_t* codes) {
    Bytes value;
    memcpy(&value, codes, sizeof value);
    return value;
  }
  static Bytes low_nibbles(Bytes bytes) { return bytes & 0x0F0F0F0Fu; }
  static Bytes high_nibbles(Bytes bytes) { return (bytes >> 4) & 0x0F0F0F0Fu; }
  static Partial dot(Partial sum, Bytes w, Bytes x) {
    for (int shift = 0; shift < 32; shift += 8) {
      sum += static_cast<int32_t>((w >> shift) & 0xFFu) * static_cast<int8_t>((x >> shift) & 0xFFu);
    }
    return sum;
  }
};

}  // namespace

const Kernels kScalarKernels = {
    quantize_row<Scalar>, multiply_block<Scalar, false>, multiply_block<Scalar, true>, half_block<Scalar>,
    store_head<Scalar>,   attend_rows<Scalar>,           skip_norm_row<Scalar>,        swi_glu_row<Scalar>};

}  // namespace fptq::cpu
