#include "device_resource.h"

#include <cstdio>
#include <new>

#include "device.h"
#include "log.h"

namespace fptq {
namespace {

// Compute capability and multiprocessors in 16 bits each, shared memory in 32.
uint64_t PackedFromDevice(const FptqDevice& device) noexcept {
  return static_cast<uint64_t>(static_cast<uint16_t>(device.compute_capability)) << 48 |
         static_cast<uint64_t>(static_cast<uint16_t>(device.multiprocessors)) << 32 |
         static_cast<uint32_t>(device.shared_memory_bytes);
}

FptqDevice DeviceFromPacked(uint64_t packed) noexcept {
  return {static_cast<int32_t>(packed >> 48), static_cast<int32_t>(packed >> 32 & 0xFFFF),
          static_cast<int32_t>(packed & 0xFFFFFFFF)};
}

// Names the resource of this copy of the library: another copy, of another version perhaps, has its own.
struct Key {
  char text[32];
  Key() noexcept {
    std::snprintf(text, sizeof(text), "fptq.devices.%p", static_cast<const void*>(&kAddress));
  }
  static constexpr char kAddress = 0;
};

}  // namespace

int32_t DeviceResource::release() noexcept {
  for (std::atomic<uint64_t>& packed : packed_) packed.store(0, std::memory_order_relaxed);
  return 0;
}

nvinfer1::IPluginResource* DeviceResource::clone() noexcept {
  auto* copy = new (std::nothrow) DeviceResource();
  if (copy == nullptr) LogError("devices: out of memory");
  return copy;
}

FptqStatus DeviceResource::Current(FptqDevice* device) noexcept {
  if (device == nullptr) return FPTQ_NULL_POINTER;
  int32_t ordinal = 0;
  FptqStatus status = CurrentOrdinal(&ordinal);
  if (status != FPTQ_OK) return status;
  if (ordinal < 0 || ordinal >= kRemembered) return DeviceFromOrdinal(ordinal, device);
  const uint64_t packed = packed_[ordinal].load(std::memory_order_relaxed);
  if (packed != 0) {
    *device = DeviceFromPacked(packed);
    return FPTQ_OK;
  }
  status = DeviceFromOrdinal(ordinal, device);
  if (status == FPTQ_OK) packed_[ordinal].store(PackedFromDevice(*device), std::memory_order_relaxed);
  return status;
}

SharedDevices::~SharedDevices() {
  if (resource_ != nullptr) ReleaseResource(registry_, Key().text);
}

void SharedDevices::Acquire(const Registry& registry) noexcept {
  if (resource_ != nullptr || registry.pointer == nullptr) return;
  // The registry keeps a clone of the first one it is given and hands that to all.
  DeviceResource prototype;
  resource_ = static_cast<DeviceResource*>(AcquireResource(registry, Key().text, &prototype));
  registry_ = registry;
}

FptqStatus SharedDevices::Current(FptqDevice* device) const noexcept {
  return resource_ != nullptr ? resource_->Current(device) : CurrentDevice(device);
}

}  // namespace fptq
