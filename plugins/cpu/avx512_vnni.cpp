// The kernels for AVX-512 F, BW and VNNI, compiled with those flags.
#include <immintrin.h>

#include "attention_kernels.h"
#include "half_kernels.h"
#include "prologue_kernels.h"
#include "vector_kernels.h"

namespace fptq::cpu {
namespace {

struct Avx512Vnni {
  using Float = __m512;
  using Int = __m512i;
  using Bytes = __m512i;
  using Partial = __m512i;  // 16 INT32 sums
  static constexpr int kLanes = 16;
  static constexpr int kTileRows = 8;
  static constexpr int kTileVectors = 2;
  static constexpr int kRowVectors = 2;
  static constexpr int kTwoChainRows = 4;
  static constexpr int kFlushK = 0;

  static Float set(float value) { return _mm512_set1_ps(value); }
  static Int set(int32_t value) { return _mm512_set1_epi32(value); }
  static Float load(const float* values) { return _mm512_loadu_ps(values); }
  static Float load(const _Float16* values) { return load_half(values); }
  static Float load_half(const void* values) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(values)));
  }
  static void store(float* to, Float value) { _mm512_storeu_ps(to, value); }
  static void store(int32_t* to, Int value) { _mm512_storeu_si512(to, value); }
  static void store_half(uint16_t* to, Float value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_codes(int8_t* to, Int value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(value));
  }

  static Float divide(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Int round(Float value) { return _mm512_cvtps_epi32(value); }
  static Float to_float(Int value) { return _mm512_cvtepi32_ps(value); }
  static Float power_of_two(Int n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
  }

  static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Int max_magnitude(Int so_far, Float value) {
    const Int bits = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7FFFFFFF));
    return _mm512_max_epi32(so_far, bits);
  }
  static int32_t reduce_add(Int value) { return _mm512_reduce_add_epi32(value); }
  static int32_t reduce_max(Int value) { return _mm512_reduce_max_epi32(value); }

  static Bytes load_bytes(const uint8_t* bytes) { return _mm512_loadu_si512(bytes); }
  static void store_bytes(uint8_t* to, Bytes value) { _mm512_storeu_si512(to, value); }
  static Bytes repeat(const int8_t* codes) {
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return _mm512_set1_epi32(four);
  }
  static Bytes low_nibbles(Bytes bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(kMaxCode)); }
  static Bytes high_nibbles(Bytes bytes) { return low_nibbles(_mm512_srli_epi16(bytes, 4)); }
  static Partial dot(Partial sum, Bytes w, Bytes x) { return _mm512_dpbusd_epi32(sum, w, x); }
};

}  // namespace

const Kernels kAvx512VnniKernels = {quantize_row<Avx512Vnni>,         multiply_block<Avx512Vnni, false>,
                                    multiply_block<Avx512Vnni, true>, half_block<Avx512Vnni>,
                                    store_head<Avx512Vnni>,           attend_rows<Avx512Vnni>,
                                    skip_norm_row<Avx512Vnni>,        swi_glu_row<Avx512Vnni>};

}  // namespace fptq::cpu
