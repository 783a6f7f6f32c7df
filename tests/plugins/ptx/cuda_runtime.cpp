/*
 * The part of the CUDA runtime that the product's host code calls, for a machine without a GPU: kernels are
 * known by name, and a launch is handed to a function that somebody sets. Grid, block, shared memory and
 * parameters are the product's own.
 */
#include <cuda_runtime_api.h>

#include <map>
#include <string>

namespace {

using LaunchFunction = int (*)(const char* name, const unsigned* grid, const unsigned* block,
                               size_t shared_bytes, const void* parameters);

constexpr size_t kSharedMemoryWithoutOptIn = 48 * 1024; /* CUDA C++ Programming Guide, compute capabilities */

struct Function {
  std::string name;
  size_t most_shared_bytes = kSharedMemoryWithoutOptIn;
};

LaunchFunction launch_function = nullptr;

std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> known;
  return known;
}

}  // namespace

extern "C" {

void ptx_set_launch_function(LaunchFunction function) { launch_function = function; }

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const auto found = functions().find(function);
  if (found == functions().end()) return cudaErrorInvalidDeviceFunction;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0) return cudaErrorInvalidValue;
  found->second.most_shared_bytes = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  const auto found = functions().find(function);
  if (found == functions().end() || launch_function == nullptr) return cudaErrorInvalidDeviceFunction;
  if (shared_bytes > found->second.most_shared_bytes) return cudaErrorInvalidValue;
  const unsigned grid3[] = {grid.x, grid.y, grid.z};
  const unsigned block3[] = {block.x, block.y, block.z};
  const int failed = launch_function(found->second.name.c_str(), grid3, block3, shared_bytes, arguments[0]);
  return failed != 0 ? cudaErrorLaunchFailure : cudaSuccess;
}

/* What the code that nvcc adds to an object calls when the library is loaded. */

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host_function, char*, const char* device_name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  functions()[host_function].name = device_name;
}

/* For the <<< >>> syntax, which the product does not use. */
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}

}  // extern "C"
