// Properties of the GPUs of a process, asked for once and shared by all plugins that run in it.
//
// Shared through TensorRT's registry (IPluginResource), which frees it with the last context. Nothing else is
// worth sharing: weights are inputs, the workspace is TensorRT's, and choosing a configuration is host
// arithmetic that takes less time than a kernel launch.
#ifndef FPTQ_SRC_DEVICE_RESOURCE_H
#define FPTQ_SRC_DEVICE_RESOURCE_H

#include <NvInferRuntime.h>

#include <atomic>
#include <cstdint>

#include "fptq/kernels.h"
#include "registry_abi.h"

namespace fptq {

// Safe from any number of threads without a lock: two that ask at once find the same and store the same.
class DeviceResource final : public nvinfer1::IPluginResource {
 public:
  int32_t release() noexcept override;
  nvinfer1::IPluginResource* clone() noexcept override;

  // Properties of the GPU of the calling thread; errors as CurrentDevice, which are never remembered.
  FptqStatus Current(FptqDevice* device) noexcept;

 private:
  // GPUs beyond these are asked each time.
  static constexpr int32_t kRemembered = 64;
  std::atomic<uint64_t> packed_[kRemembered] = {};  // 0: not asked yet
};

// One plugin's hold on the resource of its process.
class SharedDevices {
 public:
  SharedDevices() noexcept = default;
  // A copy of a plugin holds nothing until it is attached itself.
  SharedDevices(const SharedDevices&) noexcept {}
  SharedDevices& operator=(const SharedDevices&) = delete;
  ~SharedDevices();

  // Without a registry, or one of an unknown layout, nothing is shared and `Current` asks each time.
  void Acquire(const Registry& registry) noexcept;
  bool IsHeld() const noexcept { return resource_ != nullptr; }
  FptqStatus Current(FptqDevice* device) const noexcept;

 private:
  Registry registry_;
  DeviceResource* resource_ = nullptr;
};

}  // namespace fptq

#endif  // FPTQ_SRC_DEVICE_RESOURCE_H
