#include "device.h"

#include <cuda_runtime_api.h>

namespace fptq {
namespace {

FptqStatus StatusFromError(cudaError_t error) noexcept {
  switch (error) {
    case cudaSuccess:
      return FPTQ_OK;
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorStubLibrary:
      // Engines are built on machines without a driver: its error must not meet the next CUDA call.
      cudaGetLastError();
      return FPTQ_UNSUPPORTED_DEVICE;
    default:
      return FPTQ_CUDA_ERROR;
  }
}

}  // namespace

FptqStatus CurrentOrdinal(int32_t* ordinal) noexcept {
  if (ordinal == nullptr) return FPTQ_NULL_POINTER;
  return StatusFromError(cudaGetDevice(ordinal));
}

FptqStatus DeviceFromOrdinal(int32_t ordinal, FptqDevice* device) noexcept {
  if (device == nullptr) return FPTQ_NULL_POINTER;
  constexpr cudaDeviceAttr kAttributes[] = {
      cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor, cudaDevAttrMultiProcessorCount,
      cudaDevAttrMaxSharedMemoryPerBlockOptin};
  int values[4] = {};
  for (int i = 0; i < 4; ++i) {
    const FptqStatus status = StatusFromError(cudaDeviceGetAttribute(&values[i], kAttributes[i], ordinal));
    if (status != FPTQ_OK) return status;
  }
  *device = {10 * values[0] + values[1], values[2], values[3]};
  return values[0] < 8 ? FPTQ_UNSUPPORTED_DEVICE : FPTQ_OK;
}

FptqStatus CurrentDevice(FptqDevice* device) noexcept {
  int32_t ordinal = 0;
  const FptqStatus status = CurrentOrdinal(&ordinal);
  return status == FPTQ_OK ? DeviceFromOrdinal(ordinal, device) : status;
}

}  // namespace fptq
