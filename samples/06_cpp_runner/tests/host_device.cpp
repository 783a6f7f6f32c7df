#include "host_device.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fptq_run/error.h"

namespace fptq_run {
namespace {

class RecordedGraph final : public Graph {
 public:
  RecordedGraph(HostDevice& device, std::vector<HostDevice::Work> work)
      : device_(device), work_(std::move(work)) {}
  void Launch() override {
    ++device_.launches;
    for (const HostDevice::Work& item : work_) device_.Queue(item);
  }

 private:
  HostDevice& device_;
  std::vector<HostDevice::Work> work_;
};

}  // namespace

HostDevice::~HostDevice() {
  if (report_)
    std::fprintf(stderr, "double: %d calls, %d captures, %d launches\n", calls, captures_, launches);
  if (!memory_.empty()) {
    std::fprintf(stderr, "double: %zu buffers were not freed\n", memory_.size());
    std::abort();
  }
}

Address HostDevice::Allocate(std::size_t bytes) {
  if (++allocations_ == fail_allocation_)
    throw Error("GPU", "allocating " + std::to_string(bytes) + " bytes: out of memory");
  std::vector<std::byte> block(std::max<std::size_t>(bytes, 1), std::byte{0xFF});  // NaN in every float type
  Address address = block.data();
  memory_.emplace(address, std::move(block));
  return address;
}

void HostDevice::CopyToDevice(Address to, const void* from, std::size_t bytes) {
  Queue([=] { std::memcpy(to, from, bytes); }, bytes);
}

void HostDevice::CopyToHost(void* to, Address from, std::size_t bytes) {
  Queue([=] { std::memcpy(to, from, bytes); }, bytes);
}

void HostDevice::Zero(Address address, std::size_t bytes) {
  Queue([=] { std::memset(address, 0, bytes); }, bytes);
}

void HostDevice::Synchronize() {
  const std::vector<Work> work = std::exchange(queue_, {});
  for (const Work& item : work) item();
}

std::unique_ptr<Graph> HostDevice::Capture(const Work& work) {
  ++captures_;
  const std::vector<Work> before = std::exchange(queue_, {});
  try {
    work();
  } catch (...) {
    queue_ = before;
    throw;
  }
  return std::make_unique<RecordedGraph>(*this, std::exchange(queue_, before));
}

}  // namespace fptq_run
