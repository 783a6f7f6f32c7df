#include "machine_double.h"

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "engine_double.h"
#include "fptq_run/error.h"
#include "host_device.h"
#include "tiny_model.h"

namespace fptq_run {
namespace {

constexpr std::size_t kHeaderBytes = 32;

class Double final : public Machine {
 public:
  Double() {
    const char* text = std::getenv("FPTQ_DOUBLE");
    std::istringstream words(text == nullptr ? "" : text);
    settings_ = Settings(words);
  }

  LibraryFacts OpenLibrary(const std::string& /*target*/, const std::string& path) override {
    return {path.empty() ? "libtensorrt_rtx.so.1" : path, settings_.Text("target", kRtx),
            settings_.Text("library_version", "1.7.1.116")};
  }
  std::string PluginInfo(const std::string& path) override {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  std::unique_ptr<Device> OpenDevice() override {
    if (settings_.Number("gpu", 1) == 0)
      throw Error("GPU", "no NVIDIA GPU is visible, and an engine is loaded into one");
    auto device = std::make_unique<HostDevice>(settings_.Text("compute_capability", "8.9"),
                                               static_cast<int>(settings_.Number("fail_allocation", 0)),
                                               settings_.Number("report", 0) != 0);
    device_ = device.get();
    return device;
  }
  std::unique_ptr<Engine> OpenEngine(const std::string& plan, const std::string& plugin,
                                     Device& /*device*/) override {
    std::ifstream file(plan, std::ios::binary);
    file.seekg(kHeaderBytes);
    const Spec spec{Settings(file)};
    if (spec.carries_plugin && plugin != kEmbedded) throw Error(plan, "brings code that may not run");
    return TinyModelEngine(spec, *device_);
  }

 private:
  Settings settings_;
  HostDevice* device_ = nullptr;
};

}  // namespace

std::unique_ptr<Machine> MachineDouble() { return std::make_unique<Double>(); }

std::unique_ptr<Device> DeviceDouble(int fail_allocation, bool report) {
  return std::make_unique<HostDevice>("8.9", fail_allocation, report);
}

}  // namespace fptq_run
