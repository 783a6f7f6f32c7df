// What the runtime of CUDA says about a GPU, played by this file, and what becomes of it.
#include <cuda_runtime_api.h>

#include <map>

#include "device.h"
#include "harness.h"

namespace {

struct FakeCuda {
  cudaError_t get_device = cudaSuccess;
  cudaError_t get_attribute = cudaSuccess;
  int ordinal = 0;
  std::map<int, int> attributes = {{cudaDevAttrComputeCapabilityMajor, 8},
                                   {cudaDevAttrComputeCapabilityMinor, 9},
                                   {cudaDevAttrMultiProcessorCount, 142},
                                   {cudaDevAttrMaxSharedMemoryPerBlockOptin, 101376}};
  int errors_cleared = 0;
};

FakeCuda& Cuda() {
  static FakeCuda cuda;
  return cuda;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = Cuda().ordinal;
  return Cuda().get_device;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = Cuda().attributes.at(attribute);
  return device == Cuda().ordinal ? Cuda().get_attribute : cudaErrorInvalidDevice;
}

cudaError_t cudaGetLastError() {
  ++Cuda().errors_cleared;
  return cudaSuccess;
}

}  // extern "C"

TEST(AGpuIsDescribed) {
  Cuda() = FakeCuda{};
  Cuda().ordinal = 3;
  FptqDevice device{};
  EXPECT_EQ(fptq::CurrentDevice(&device), FPTQ_OK);
  EXPECT_EQ(device.compute_capability, 89);
  EXPECT_EQ(device.multiprocessors, 142);
  EXPECT_EQ(device.shared_memory_bytes, 101376);
}

TEST(AnOldGpuIsUnsupported) {
  Cuda() = FakeCuda{};
  Cuda().attributes[cudaDevAttrComputeCapabilityMajor] = 7;
  FptqDevice device{};
  EXPECT_EQ(fptq::CurrentDevice(&device), FPTQ_UNSUPPORTED_DEVICE);
}

TEST(AMachineWithoutAGpuIsNoError) {
  for (cudaError_t error : {cudaErrorNoDevice, cudaErrorInsufficientDriver, cudaErrorStubLibrary}) {
    Cuda() = FakeCuda{};
    Cuda().get_device = error;
    FptqDevice device{};
    EXPECT_EQ(fptq::CurrentDevice(&device), FPTQ_UNSUPPORTED_DEVICE);
    EXPECT_EQ(Cuda().errors_cleared, 1);  // it must not meet the next CUDA call
  }
}

TEST(AnErrorOfCudaIsNotTakenForAnOldGpu) {
  for (cudaError_t error : {cudaErrorIllegalAddress, cudaErrorInvalidDevice, cudaErrorUnknown}) {
    Cuda() = FakeCuda{};
    Cuda().get_attribute = error;
    FptqDevice device{};
    EXPECT_EQ(fptq::CurrentDevice(&device), FPTQ_CUDA_ERROR);
    EXPECT_EQ(Cuda().errors_cleared, 0);  // left for the caller to read
  }
}

TEST(MissingPointersAreRefused) {
  EXPECT_EQ(fptq::CurrentDevice(nullptr), FPTQ_NULL_POINTER);
  EXPECT_EQ(fptq::CurrentOrdinal(nullptr), FPTQ_NULL_POINTER);
  EXPECT_EQ(fptq::DeviceFromOrdinal(0, nullptr), FPTQ_NULL_POINTER);
}

int main(int argc, char** argv) { return harness::RunTests(argc > 1 ? argv[1] : ""); }
