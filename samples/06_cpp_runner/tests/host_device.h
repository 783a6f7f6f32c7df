// A GPU that is memory of the host.
#ifndef FPTQ_RUN_TESTS_HOST_DEVICE_H
#define FPTQ_RUN_TESTS_HOST_DEVICE_H

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fptq_run/device.h"

namespace fptq_run {

// Work is done at Synchronize, not before. New memory is full of NaN. Its end aborts the process where memory was not
// freed.
class HostDevice final : public Device {
 public:
  using Work = std::function<void()>;

  // Allocation number `fail_allocation` (from 1) fails; `report` says at the end, on standard error, what was done.
  HostDevice(std::string compute_capability, int fail_allocation, bool report)
      : compute_capability_(std::move(compute_capability)),
        fail_allocation_(fail_allocation),
        report_(report) {}
  HostDevice(const HostDevice&) = delete;
  HostDevice& operator=(const HostDevice&) = delete;
  ~HostDevice() override;

  [[nodiscard]] std::string Name() const override { return "a double"; }
  [[nodiscard]] std::string ComputeCapability() const override { return compute_capability_; }

  Address Allocate(std::size_t bytes) override;
  void Free(Address address) noexcept override { memory_.erase(address); }

  void CopyToDevice(Address to, const void* from, std::size_t bytes) override;
  void CopyToHost(void* to, Address from, std::size_t bytes) override;
  void Zero(Address address, std::size_t bytes) override;
  void Synchronize() override;
  std::unique_ptr<Graph> Capture(const Work& work) override;

  void Queue(Work work, std::size_t bytes = 1) {
    if (bytes != 0) queue_.push_back(std::move(work));
  }

  int calls = 0;
  int launches = 0;

 private:
  std::string compute_capability_;
  int fail_allocation_;
  bool report_;
  int allocations_ = 0;
  int captures_ = 0;
  std::map<Address, std::vector<std::byte>> memory_;
  std::vector<Work> queue_;
};

}  // namespace fptq_run

#endif  // FPTQ_RUN_TESTS_HOST_DEVICE_H
