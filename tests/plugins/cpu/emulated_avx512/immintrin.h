/*
 * The AVX-512 instructions that plugins/cpu uses, on a machine with AVX2: its own <immintrin.h>, with 512-bit vectors
 * as two 256-bit ones. What AVX2 has is done by it, so that NaN, ties and limits are those of the processor. What it
 * does not have is written out as in Intel's manual.
 */
#ifndef FPTQ_TESTS_EMULATED_AVX512_H
#define FPTQ_TESTS_EMULATED_AVX512_H

#include_next <immintrin.h>

namespace fptq::emulated {

struct Float512 {
  __m256 halves[2];
};

struct Int512 {
  __m256i halves[2];
};

template <class Result, class Operation>
inline Result of_halves(const Operation& operation) {
  return {{operation(0), operation(1)}};
}

inline Float512 set1_ps(float value) {
  return of_halves<Float512>([&](int) { return _mm256_set1_ps(value); });
}
inline Float512 loadu_ps(const void* from) {
  return of_halves<Float512>(
      [&](int half) { return _mm256_loadu_ps(static_cast<const float*>(from) + 8 * half); });
}
inline void storeu_ps(void* to, Float512 value) {
  for (int half = 0; half < 2; ++half)
    _mm256_storeu_ps(static_cast<float*>(to) + 8 * half, value.halves[half]);
}
inline Float512 add_ps(Float512 a, Float512 b) {
  return of_halves<Float512>([&](int half) { return _mm256_add_ps(a.halves[half], b.halves[half]); });
}
inline Float512 mul_ps(Float512 a, Float512 b) {
  return of_halves<Float512>([&](int half) { return _mm256_mul_ps(a.halves[half], b.halves[half]); });
}
inline Float512 div_ps(Float512 a, Float512 b) {
  return of_halves<Float512>([&](int half) { return _mm256_div_ps(a.halves[half], b.halves[half]); });
}
inline Float512 max_ps(Float512 a, Float512 b) {
  return of_halves<Float512>([&](int half) { return _mm256_max_ps(a.halves[half], b.halves[half]); });
}
inline Float512 min_ps(Float512 a, Float512 b) {
  return of_halves<Float512>([&](int half) { return _mm256_min_ps(a.halves[half], b.halves[half]); });
}
inline Float512 fmadd_ps(Float512 a, Float512 b, Float512 c) {
  return of_halves<Float512>(
      [&](int half) { return _mm256_fmadd_ps(a.halves[half], b.halves[half], c.halves[half]); });
}

inline Int512 set1_epi32(int value) {
  return of_halves<Int512>([&](int) { return _mm256_set1_epi32(value); });
}
inline Int512 set1_epi8(char value) {
  return of_halves<Int512>([&](int) { return _mm256_set1_epi8(value); });
}
inline Int512 loadu_si512(const void* from) {
  return of_halves<Int512>(
      [&](int half) { return _mm256_loadu_si256(static_cast<const __m256i*>(from) + half); });
}
inline void storeu_si512(void* to, Int512 value) {
  for (int half = 0; half < 2; ++half)
    _mm256_storeu_si256(static_cast<__m256i*>(to) + half, value.halves[half]);
}
inline Int512 add_epi32(Int512 a, Int512 b) {
  return of_halves<Int512>([&](int half) { return _mm256_add_epi32(a.halves[half], b.halves[half]); });
}
inline Int512 and_si512(Int512 a, Int512 b) {
  return of_halves<Int512>([&](int half) { return _mm256_and_si256(a.halves[half], b.halves[half]); });
}
inline Int512 max_epi32(Int512 a, Int512 b) {
  return of_halves<Int512>([&](int half) { return _mm256_max_epi32(a.halves[half], b.halves[half]); });
}
inline Int512 slli_epi32(Int512 a, unsigned count) {
  return of_halves<Int512>(
      [&](int half) { return _mm256_slli_epi32(a.halves[half], static_cast<int>(count)); });
}
inline Int512 srli_epi16(Int512 a, unsigned count) {
  return of_halves<Int512>(
      [&](int half) { return _mm256_srli_epi16(a.halves[half], static_cast<int>(count)); });
}

inline Int512 cvtps_epi32(Float512 a) {
  return of_halves<Int512>([&](int half) { return _mm256_cvtps_epi32(a.halves[half]); });
}
inline Float512 cvtepi32_ps(Int512 a) {
  return of_halves<Float512>([&](int half) { return _mm256_cvtepi32_ps(a.halves[half]); });
}
inline Int512 castps_si512(Float512 a) {
  return of_halves<Int512>([&](int half) { return _mm256_castps_si256(a.halves[half]); });
}
inline Float512 castsi512_ps(Int512 a) {
  return of_halves<Float512>([&](int half) { return _mm256_castsi256_ps(a.halves[half]); });
}
inline Float512 cvtph_ps(__m256i a) {
  return {{_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))}};
}
template <int ROUNDING>
inline __m256i cvtps_ph(Float512 a) {
  return _mm256_set_m128i(_mm256_cvtps_ph(a.halves[1], ROUNDING), _mm256_cvtps_ph(a.halves[0], ROUNDING));
}

struct Lanes {
  int values[16];
};

inline Lanes lanes_of(Int512 a) {
  Lanes lanes;
  storeu_si512(lanes.values, a);
  return lanes;
}
// Truncated, not saturated.
inline __m128i cvtepi32_epi8(Int512 a) {
  const Lanes lanes = lanes_of(a);
  signed char bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<signed char>(lanes.values[i]);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}
inline int reduce_add_epi32(Int512 a) {
  unsigned sum = 0;
  for (const int value : lanes_of(a).values) sum += static_cast<unsigned>(value);
  return static_cast<int>(sum);
}
inline int reduce_max_epi32(Int512 a) {
  const Lanes lanes = lanes_of(a);
  int largest = lanes.values[0];
  for (const int value : lanes.values) largest = value > largest ? value : largest;
  return largest;
}
// VNNI: to each lane the products of its four bytes, of `a` without a sign and of `b` with one. Wraps, does not saturate.
inline Int512 dpbusd_epi32(Int512 sum, Int512 a, Int512 b) {
  Lanes lanes = lanes_of(sum);
  unsigned char a_bytes[64];
  signed char b_bytes[64];
  storeu_si512(a_bytes, a);
  storeu_si512(b_bytes, b);
  for (int i = 0; i < 64; ++i) {
    const unsigned product = static_cast<unsigned>(a_bytes[i] * b_bytes[i]);
    lanes.values[i / 4] = static_cast<int>(static_cast<unsigned>(lanes.values[i / 4]) + product);
  }
  return loadu_si512(lanes.values);
}

}  // namespace fptq::emulated

#define __m512 ::fptq::emulated::Float512
#define __m512i ::fptq::emulated::Int512
#define _mm512_add_epi32 ::fptq::emulated::add_epi32
#define _mm512_add_ps ::fptq::emulated::add_ps
#define _mm512_and_si512 ::fptq::emulated::and_si512
#define _mm512_castps_si512 ::fptq::emulated::castps_si512
#define _mm512_castsi512_ps ::fptq::emulated::castsi512_ps
#define _mm512_cvtepi32_epi8 ::fptq::emulated::cvtepi32_epi8
#define _mm512_cvtepi32_ps ::fptq::emulated::cvtepi32_ps
#define _mm512_cvtph_ps ::fptq::emulated::cvtph_ps
#define _mm512_cvtps_epi32 ::fptq::emulated::cvtps_epi32
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(value, rounding) ::fptq::emulated::cvtps_ph<rounding>(value)
#define _mm512_div_ps ::fptq::emulated::div_ps
#define _mm512_dpbusd_epi32 ::fptq::emulated::dpbusd_epi32
#define _mm512_fmadd_ps ::fptq::emulated::fmadd_ps
#define _mm512_loadu_ps ::fptq::emulated::loadu_ps
#define _mm512_loadu_si512 ::fptq::emulated::loadu_si512
#define _mm512_max_epi32 ::fptq::emulated::max_epi32
#define _mm512_max_ps ::fptq::emulated::max_ps
#define _mm512_min_ps ::fptq::emulated::min_ps
#define _mm512_mul_ps ::fptq::emulated::mul_ps
#define _mm512_reduce_add_epi32 ::fptq::emulated::reduce_add_epi32
#define _mm512_reduce_max_epi32 ::fptq::emulated::reduce_max_epi32
#define _mm512_set1_epi32 ::fptq::emulated::set1_epi32
#define _mm512_set1_epi8 ::fptq::emulated::set1_epi8
#define _mm512_set1_ps ::fptq::emulated::set1_ps
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 ::fptq::emulated::slli_epi32
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 ::fptq::emulated::srli_epi16
#define _mm512_storeu_ps ::fptq::emulated::storeu_ps
#define _mm512_storeu_si512 ::fptq::emulated::storeu_si512

#endif  // FPTQ_TESTS_EMULATED_AVX512_H
