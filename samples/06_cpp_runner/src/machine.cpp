#include <optional>
#include <stdexcept>

#include "cuda_device.h"
#include "fptq_run/command.h"
#include "shared_library.h"
#include "tensorrt_engine.h"

namespace fptq_run {
namespace {

class RealMachine final : public Machine {
 public:
  LibraryFacts OpenLibrary(const std::string& target, const std::string& path) override {
    library_.emplace(OpenTensorRt(target, path));
    return FactsOf(*library_);
  }

  std::string PluginInfo(const std::string& path) override {
    const SharedLibrary plugin({path}, "build it: python -m fptq_export.plugin build");
    auto* info = plugin.Find<const char*()>("fptqPluginInfo");
    return info == nullptr ? "" : info();
  }

  std::unique_ptr<Device> OpenDevice() override {
    std::unique_ptr<StreamDevice> device = OpenCudaDevice();
    device_ = device.get();
    return device;
  }

  std::unique_ptr<Engine> OpenEngine(const std::string& plan, const std::string& plugin,
                                     Device& /*device*/) override {
    if (!library_.has_value() || device_ == nullptr) throw std::logic_error("library and device come first");
    return LoadEngine(*library_, plan, plugin, *device_);
  }

 private:
  std::optional<SharedLibrary> library_;
  StreamDevice* device_ = nullptr;  // the one that OpenDevice gave away
};

}  // namespace

std::unique_ptr<Machine> MachineOfHere() { return std::make_unique<RealMachine>(); }

}  // namespace fptq_run
