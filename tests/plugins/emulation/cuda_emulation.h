/*
 * The names of plugins/src/ptx_ops.h, with checks instead of speed: kernels
 * compiled with -DFPTQ_EMULATION run on the host, one fiber a CUDA thread. A
 * failed check stops the launch, which then returns FPTQ_CUDA_ERROR; the reason
 * is kept.
 *
 * Checked: global bounds, alignment and races inside a launch; shared bounds,
 * alignment, races between barriers, reads of bytes never written, touching
 * bytes that a cp.async still writes; lanes or threads that meet at different
 * collectives; deadlock. Counted: bank conflicts of ldmatrix and, on request,
 * of plain shared loads.
 *
 * cp.async is as late as the rules allow: its target is poisoned at once and
 * filled when the thread waits for its group.
 */
#ifndef FPTQ_TESTS_CUDA_EMULATION_H
#define FPTQ_TESTS_CUDA_EMULATION_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace fptq {

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};

namespace emulation {

using Site = std::source_location;

enum class Access { kRead, kWrite };
enum class Matrix { kS8S8, kS8U8, kS8S8K16 };

/* Runs body once for each thread of each block, blocks one after another.
 * False: a check failed. */
bool run_grid(uint32_t grid_x, uint32_t grid_y, uint32_t threads, size_t shared_bytes,
              const std::function<void()>& body);

[[noreturn]] void fail(const char* reason);
int current_thread();
int current_block_x();
int current_block_y();
unsigned char* shared_memory();

void barrier(const Site& site);
void warp_shuffle_xor(void* value, size_t bytes, int mask, const Site& site);
void check_shared(const void* address, size_t bytes, Access access, const Site& site);
void check_global(const void* address, size_t bytes, Access access, bool constant);
void async_copy(void* smem, const void* gmem, bool valid);
void async_commit();
void async_wait(int pending);
void matrix_load(uint32_t* fragment, const void* smem_row, bool transposed, const Site& site);
void matrix_multiply(Matrix kind, int* d, const uint32_t* a, const uint32_t* b, const int* c,
                     const Site& site);
void trace(int row, int column, int group, int sum);

}  // namespace emulation

inline int thread_id() { return emulation::current_thread(); }
inline int warp_id() { return emulation::current_thread() / 32; }
inline int block_id_x() { return emulation::current_block_x(); }
inline int block_id_y() { return emulation::current_block_y(); }
inline unsigned char* dynamic_shared() { return emulation::shared_memory(); }

inline void sync_block(const emulation::Site& site = emulation::Site::current()) { emulation::barrier(site); }

template <typename T>
T shuffle_xor(T value, int mask, const emulation::Site& site = emulation::Site::current()) {
  emulation::warp_shuffle_xor(&value, sizeof(T), mask, site);
  return value;
}

template <typename T>
T load_shared(const void* smem, const emulation::Site& site = emulation::Site::current()) {
  emulation::check_shared(smem, sizeof(T), emulation::Access::kRead, site);
  T value;
  std::memcpy(&value, smem, sizeof(T));
  return value;
}
template <typename T>
void store_shared(void* smem, T value, const emulation::Site& site = emulation::Site::current()) {
  emulation::check_shared(smem, sizeof(T), emulation::Access::kWrite, site);
  std::memcpy(smem, &value, sizeof(T));
}
template <typename T>
T load_global(const void* gmem) {
  emulation::check_global(gmem, sizeof(T), emulation::Access::kRead, false);
  T value;
  std::memcpy(&value, gmem, sizeof(T));
  return value;
}
template <typename T>
T load_global_constant(const void* gmem) {
  emulation::check_global(gmem, sizeof(T), emulation::Access::kRead, true);
  T value;
  std::memcpy(&value, gmem, sizeof(T));
  return value;
}
inline uint4 load_global_once(const void* gmem) { return load_global_constant<uint4>(gmem); }
template <typename T>
void store_global(void* gmem, T value) {
  emulation::check_global(gmem, sizeof(T), emulation::Access::kWrite, false);
  std::memcpy(gmem, &value, sizeof(T));
}

inline void cp_async_16(void* smem, const void* gmem, bool valid) {
  emulation::async_copy(smem, gmem, valid);
}
inline void cp_async_commit() { emulation::async_commit(); }
template <int kPending>
void cp_async_wait() {
  emulation::async_wait(kPending);
}

inline void ldmatrix_x4(uint32_t (&fragment)[4], const void* smem_row,
                        const emulation::Site& site = emulation::Site::current()) {
  emulation::matrix_load(fragment, smem_row, false, site);
}
inline void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* smem_row,
                              const emulation::Site& site = emulation::Site::current()) {
  emulation::matrix_load(fragment, smem_row, true, site);
}
inline void mma_s8_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4],
                      const emulation::Site& site = emulation::Site::current()) {
  const uint32_t b[2] = {b0, b1};
  emulation::matrix_multiply(emulation::Matrix::kS8S8, d, a, b, c, site);
}
inline void mma_s8_u8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4],
                      const emulation::Site& site = emulation::Site::current()) {
  const uint32_t b[2] = {b0, b1};
  emulation::matrix_multiply(emulation::Matrix::kS8U8, d, a, b, c, site);
}
inline void mma_s8_s8_k16(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0, const int (&c)[4],
                          const emulation::Site& site = emulation::Site::current()) {
  const uint32_t a[4] = {a0, a1, 0, 0};
  const uint32_t b[2] = {b0, 0};
  emulation::matrix_multiply(emulation::Matrix::kS8S8K16, d, a, b, c, site);
}

/* The hardware's sums wrap; here an INT32 overflow is a failed check, because
 * no exact kernel may come to one. */
inline int checked_add(int64_t a, int64_t b) {
  const int64_t sum = a + b;
  if (sum != static_cast<int32_t>(sum)) emulation::fail("INT32 overflow of an accumulator");
  return static_cast<int>(sum);
}
inline int dp4a_s8_s8(uint32_t a, uint32_t b, int c) {
  int sum = 0;
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return checked_add(sum, c);
}
inline int dp4a_s8_u8(uint32_t a, uint32_t b, int c) {
  int sum = 0;
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<uint8_t>(b >> i);
  return checked_add(sum, c);
}

template <int kByte>
uint32_t extract_byte(uint32_t word) {
  return word >> (8 * kByte) & 0xFFu;
}
template <int kByte>
uint32_t replicate_byte(uint32_t word) {
  return extract_byte<kByte>(word) * 0x01010101u;
}

inline float fma_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float divide_rn(float a, float b) { return a / b; }
inline float float_from_int(int value) { return static_cast<float>(value); }
inline float round_to_integer(float value) { return std::nearbyintf(value); }
inline float float_from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t bits_from_float(float value) { return __builtin_bit_cast(uint32_t, value); }
inline float float_from_half(uint16_t bits) { return static_cast<float>(__builtin_bit_cast(_Float16, bits)); }
inline float float_from_bfloat16(uint16_t bits) { return float_from_bits(uint32_t{bits} << 16); }
inline uint16_t half_from_float(float value) {
  return __builtin_bit_cast(uint16_t, static_cast<_Float16>(value));
}
inline uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = bits_from_float(value);
  if (value != value) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

inline void trace_group_sum(int row, int column, int group, int sum) {
  emulation::trace(row, column, group, sum);
}

}  // namespace fptq

#endif  // FPTQ_TESTS_CUDA_EMULATION_H
