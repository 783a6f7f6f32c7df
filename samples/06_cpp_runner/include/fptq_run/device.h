// A GPU as the runner needs it: memory, copies, and work that is captured once and launched again.
//
// Everything else is written against this interface, so that it is tested on a machine without a GPU.
#ifndef FPTQ_RUN_DEVICE_H
#define FPTQ_RUN_DEVICE_H

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <utility>

namespace fptq_run {

// An address in the memory of a device.
using Address = void*;

// Captured work.
class Graph {
 public:
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  virtual ~Graph() = default;

  // Queues the work again, on the addresses it was captured with.
  virtual void Launch() = 0;
};

// Copies and work are queued on one stream, in order, and done for sure after Synchronize: until then memory of
// the host that they read or write must stay. Every function but Free throws Error.
class Device {
 public:
  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  virtual ~Device() = default;

  [[nodiscard]] virtual std::string Name() const = 0;
  // "8.9"
  [[nodiscard]] virtual std::string ComputeCapability() const = 0;

  // `bytes` may be 0; the address is valid all the same.
  virtual Address Allocate(std::size_t bytes) = 0;
  virtual void Free(Address address) noexcept = 0;

  virtual void CopyToDevice(Address to, const void* from, std::size_t bytes) = 0;
  virtual void CopyToHost(void* to, Address from, std::size_t bytes) = 0;
  virtual void Zero(Address address, std::size_t bytes) = 0;
  virtual void Synchronize() = 0;

  // Calls `work`, whose queued work is captured instead of done. Where `work` throws, the capture ends too.
  virtual std::unique_ptr<Graph> Capture(const std::function<void()>& work) = 0;
};

// Owns memory of a device.
class DeviceBuffer {
 public:
  DeviceBuffer(Device& device, std::size_t bytes)
      : device_(&device), bytes_(bytes), address_(device.Allocate(bytes)) {}
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : device_(other.device_), bytes_(other.bytes_), address_(std::exchange(other.address_, nullptr)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(bytes_, other.bytes_);
    std::swap(address_, other.address_);
    return *this;
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() {
    if (address_ != nullptr) device_->Free(address_);
  }

  [[nodiscard]] Address address() const { return address_; }
  [[nodiscard]] std::size_t bytes() const { return bytes_; }

 private:
  Device* device_;
  std::size_t bytes_;
  Address address_;
};

}  // namespace fptq_run

#endif  // FPTQ_RUN_DEVICE_H
