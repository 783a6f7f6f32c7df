#include "device.h"

#include <cuda_runtime_api.h>

namespace fptq {

FptqStatus CurrentDevice(FptqDevice* device) noexcept {
  if (device == nullptr) return FPTQ_NULL_POINTER;
  int ordinal = 0, major = 0, minor = 0, multiprocessors = 0, shared_memory = 0;
  if (cudaGetDevice(&ordinal) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, ordinal) != cudaSuccess ||
      cudaDeviceGetAttribute(&shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal) !=
          cudaSuccess) {
    // A machine without a driver is a place to build engines on: its error must not meet the next CUDA call.
    cudaGetLastError();
    return FPTQ_UNSUPPORTED_DEVICE;
  }
  *device = {10 * major + minor, multiprocessors, shared_memory};
  return major < 8 ? FPTQ_UNSUPPORTED_DEVICE : FPTQ_OK;
}

}  // namespace fptq
