// The kernels for AVX2 with FMA and F16C, compiled with those flags.
#include <immintrin.h>

#include "attention_kernels.h"
#include "half_kernels.h"
#include "prologue_kernels.h"
#include "vector_kernels.h"

namespace fptq::cpu {
namespace {

struct Avx2 {
  using Float = __m256;
  using Int = __m256i;
  using Bytes = __m256i;
  using Partial = __m256i;  // 16 INT16 sums: vpmaddubsw adds two products in 16 bits
  static constexpr int kLanes = 8;
  static constexpr int kTileRows =
      4;  // 8 partial sums, 4 vectors of weights and their operands fill 16 registers
  static constexpr int kTileVectors = 2;
  static constexpr int kRowVectors = 4;
  static constexpr int kTwoChainRows = 0;
  static constexpr int kFlushK = 32;
  static_assert(kFlushK / 2 * kMaxCode * 128 <= 32767,
                "a lane takes half of the products between two flushes");

  static Float set(float value) { return _mm256_set1_ps(value); }
  static Int set(int32_t value) { return _mm256_set1_epi32(value); }
  static Float load(const float* values) { return _mm256_loadu_ps(values); }
  static Float load(const _Float16* values) { return load_half(values); }
  static Float load_half(const void* values) {
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(values)));
  }
  static void store(float* to, Float value) { _mm256_storeu_ps(to, value); }
  static void store(int32_t* to, Int value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }
  static void store_half(uint16_t* to, Float value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_codes(int8_t* to, Int value) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  }

  static Float divide(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Int round(Float value) { return _mm256_cvtps_epi32(value); }
  static Float to_float(Int value) { return _mm256_cvtepi32_ps(value); }
  static Float power_of_two(Int n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }

  static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Int max_magnitude(Int so_far, Float value) {
    const Int bits = _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7FFFFFFF));
    return _mm256_max_epi32(so_far, bits);
  }
  static int32_t reduce_add(Int value) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
  }
  static int32_t reduce_max(Int value) {
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(most, _mm_shuffle_epi32(most, 0xB1)));
  }

  static Bytes load_bytes(const uint8_t* bytes) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  }
  static void store_bytes(uint8_t* to, Bytes value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
  }
  static Bytes repeat(const int8_t* codes) {
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return _mm256_set1_epi32(four);
  }
  static Bytes low_nibbles(Bytes bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(kMaxCode)); }
  static Bytes high_nibbles(Bytes bytes) { return low_nibbles(_mm256_srli_epi16(bytes, 4)); }
  static Partial dot(Partial sum, Bytes w, Bytes x) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
  }
  static Int widen(Partial sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};

}  // namespace

const Kernels kAvx2Kernels = {
    quantize_row<Avx2>, multiply_block<Avx2, false>, multiply_block<Avx2, true>, half_block<Avx2>,
    store_head<Avx2>,   attend_rows<Avx2>,           skip_norm_row<Avx2>,        swi_glu_row<Avx2>};

}  // namespace fptq::cpu
