// Library libfptq_trt_static.so: registers its creators when it is loaded (Polygraphy --plugins, Triton
// plugins=, LD_PRELOAD, trtexec --staticPlugins).
//
// REGISTER_TENSORRT_PLUGIN is not used: it registers under the empty namespace whatever the creator says, and
// lookups by the node's namespace then fail.
#include "log.h"
#include "plugin.h"
#include "registry_abi.h"

namespace {

bool Register() noexcept {
  const fptq::Registry registry = fptq::FindRegistry();
  if (registry.pointer == nullptr && registry.major == 0) {
    fptq::LogError("no TensorRT is loaded or found: the plugins are not registered");
    return false;
  }
  if (registry.pointer == nullptr || fptq::RegisterCreatorEntry(registry.major) == fptq::kUnknownEntry) {
    fptq::LogError(
        "TensorRT %d is not one this library knows (10, 11, RTX 1): the plugins are not registered",
        registry.major);
    return false;
  }
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* creators = fptq::Creators(&count);
  bool registered = true;
  for (int32_t i = 0; i < count; ++i) {
    registered &= fptq::RegisterCreator(registry, creators[i], fptq::kPluginNamespace);
  }
  if (!registered) fptq::LogError("the registry refused a plugin: is another copy of this library loaded?");
  return registered;
}

const bool kRegistered = Register();

}  // namespace

// Whether the creators are in the registry of the process.
extern "C" __attribute__((visibility("default"))) int fptqIsRegistered() { return kRegistered ? 1 : 0; }
