/* Starting a kernel: every kernel takes one parameter struct by value. */
#ifndef FPTQ_SRC_LAUNCH_H
#define FPTQ_SRC_LAUNCH_H

#include <cstddef>
#include <cstdint>

#include "fptq/kernels.h"
#include "ptx_ops.h"

namespace fptq {

/* Shared memory that a block gets without opting in, on every architecture. */
inline constexpr size_t kSharedMemoryWithoutOptIn = 48 * 1024;

#ifndef FPTQ_EMULATION

template <typename Params>
FptqStatus launch(void (*kernel)(Params), uint32_t grid_x, uint32_t grid_y, uint32_t threads,
                  size_t shared_bytes, FptqStream stream, Params params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kSharedMemoryWithoutOptIn &&
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(shared_bytes)) != cudaSuccess) {
    return FPTQ_CUDA_ERROR;
  }
  void* arguments[] = {&params};
  const cudaError_t error =
      cudaLaunchKernel(function, dim3(grid_x, grid_y), dim3(threads), arguments, shared_bytes, stream);
  return error == cudaSuccess ? FPTQ_OK : FPTQ_CUDA_ERROR;
}

#else

template <typename Params>
FptqStatus launch(void (*kernel)(Params), uint32_t grid_x, uint32_t grid_y, uint32_t threads,
                  size_t shared_bytes, FptqStream, Params params) {
  return emulation::run_grid(grid_x, grid_y, threads, shared_bytes, [&] { kernel(params); })
             ? FPTQ_OK
             : FPTQ_CUDA_ERROR;
}

#endif

}  // namespace fptq

#endif  // FPTQ_SRC_LAUNCH_H
