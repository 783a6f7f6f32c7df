/*
 * One thin wrapper for each thing that a kernel asks of the machine. The kernels use nothing else, so the
 * same kernel source also compiles as host C++ with -DFPTQ_EMULATION, where cuda_emulation.h gives these
 * names a checked meaning.
 *
 * Fragment layouts (PTX ISA, "Matrix Fragments for mma.m16n8k32"), for lane l of a warp:
 *   A, 16 x 32 INT8: registers 0, 1 hold rows l / 4 and l / 4 + 8 at columns 4 * (l % 4) .. + 3;
 *                    registers 2, 3 the same rows 16 columns on.
 *   B, 32 x 8 INT8:  register 0 holds column l / 4 at rows 4 * (l % 4) .. + 3; register 1 is 16 rows on.
 *   C, 16 x 8 INT32: registers 0, 1 hold row l / 4 at columns 2 * (l % 4) and + 1; registers 2, 3 hold row
 *                    l / 4 + 8.
 */
#ifndef FPTQ_SRC_PTX_OPS_H
#define FPTQ_SRC_PTX_OPS_H

#ifdef FPTQ_EMULATION
#include "cuda_emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fptq {

/* ---- where a thread is ---- */

__device__ __forceinline__ int thread_id() { return static_cast<int>(threadIdx.x); }
/* thread_id() / 32, and the compiler knows that the lanes of a warp agree on it. All 32 must call it. */
__device__ __forceinline__ int warp_id() {
  return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / 32, 0);
}
__device__ __forceinline__ int block_id_x() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int block_id_y() { return static_cast<int>(blockIdx.y); }

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char smem[];
  return smem;
}

/* ---- synchronization ---- */

__device__ __forceinline__ void sync_block() { __syncthreads(); }

/* Value of the lane whose index differs by `mask`. All 32 lanes must call it. */
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

/* ---- memory ---- */

__device__ __forceinline__ uint32_t shared_address(const void* smem) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

template <typename T>
__device__ __forceinline__ T load_shared(const void* smem) {
  return *static_cast<const T*>(smem);
}
template <typename T>
__device__ __forceinline__ void store_shared(void* smem, T value) {
  *static_cast<T*>(smem) = value;
}
template <typename T>
__device__ __forceinline__ T load_global(const void* gmem) {
  return *static_cast<const T*>(gmem);
}
/* For data that no thread of the launch writes. */
template <typename T>
__device__ __forceinline__ T load_global_constant(const void* gmem) {
  return __ldg(static_cast<const T*>(gmem));
}
/* For data that is read once: weights must not push activations out of L1. */
__device__ __forceinline__ uint4 load_global_once(const void* gmem) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(gmem));
  return v;
}
template <typename T>
__device__ __forceinline__ void store_global(void* gmem, T value) {
  *static_cast<T*>(gmem) = value;
}

/* Starts a copy of 16 bytes to shared memory; writes zeros and reads nothing when `valid` is false. */
__device__ __forceinline__ void cp_async_16(void* smem, const void* gmem, bool valid) {
  const int source_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(smem)), "l"(gmem), "r"(source_bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Waits until at most kPending of this thread's groups are still under way. */
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/* Four 8 x 8 matrices of 16-bit elements; lane l gives the row address l % 8 of matrix l / 8. */
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&fragment)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(smem_row))
               : "memory");
}
/* As ldmatrix_x4, transposed: lane l gets column l / 4 of rows 2 * (l % 4), low, and + 1, high. */
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* smem_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(smem_row))
               : "memory");
}

/* ---- integer arithmetic ---- */

/* d = a (16 x 32, INT8) * b (32 x 8, INT8) + c. Never .satfinite: it would hide an overflow instead of
 * preventing it. */
__device__ __forceinline__ void mma_s8_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                          const int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]),
        "r"(c[3]));
}
/* As mma_s8_s8 with UINT8 b. */
__device__ __forceinline__ void mma_s8_u8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                          const int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]),
        "r"(c[3]));
}
/* d = a (16 x 16, INT8) * b (16 x 8, INT8) + c: half of the k extent of mma_s8_s8, for groups of 16. */
__device__ __forceinline__ void mma_s8_s8_k16(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0,
                                              const int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(b0), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}
/* c + dot product of four INT8 and four INT8. */
__device__ __forceinline__ int dp4a_s8_s8(uint32_t a, uint32_t b, int c) {
  return __dp4a(static_cast<int>(a), static_cast<int>(b), c);
}
/* c + dot product of four INT8 (a) and four UINT8 (b). */
__device__ __forceinline__ int dp4a_s8_u8(uint32_t a, uint32_t b, int c) {
  int d;
  asm("dp4a.s32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

/* Byte kByte of `word` as a number, and in all four bytes. */
template <int kByte>
__device__ __forceinline__ uint32_t extract_byte(uint32_t word) {
  return __byte_perm(word, 0, 0x4440 + kByte);
}
template <int kByte>
__device__ __forceinline__ uint32_t replicate_byte(uint32_t word) {
  return __byte_perm(word, 0, 0x1111 * kByte);
}

/* ---- floating point: each with its rounding, so that the compiler may not contract or approximate ---- */

__device__ __forceinline__ float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float divide_rn(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float float_from_int(int value) { return __int2float_rn(value); }
/* Ties to even. */
__device__ __forceinline__ float round_to_integer(float value) { return rintf(value); }
__device__ __forceinline__ float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_from_float(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float float_from_half(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ float float_from_bfloat16(uint16_t bits) {
  return __uint_as_float(uint32_t{bits} << 16);
}
__device__ __forceinline__ uint16_t half_from_float(float value) {
  return __half_as_ushort(__float2half_rn(value));
}
__device__ __forceinline__ uint16_t bfloat16_from_float(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

/* ---- debugging ---- */

/* The emulator records the exact integer sum of a group here. Nothing on the device. */
__device__ __forceinline__ void trace_group_sum(int, int, int, int) {}

}  // namespace fptq

#endif  // FPTQ_EMULATION
#endif  // FPTQ_SRC_PTX_OPS_H
