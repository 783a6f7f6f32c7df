// Library libfptq_trt_static.so: registers its creators when it is loaded (Polygraphy --plugins, Triton
// plugins=, LD_PRELOAD, trtexec --staticPlugins).
//
// REGISTER_TENSORRT_PLUGIN is not used: it registers under the empty namespace whatever the creator says, and
// lookups by the node's namespace then fail. TensorRT is looked for among the libraries that are loaded
// already, so that one library serves TensorRT 10, TensorRT 11 and TensorRT for RTX; Python wheels load
// theirs with RTLD_LOCAL, hence the search by name.
#include <dlfcn.h>

#include <initializer_list>

#include "log.h"
#include "plugin.h"
#include "registry_abi.h"

namespace {

constexpr const char* kLibraries[] = {"libnvinfer.so.11", "libnvinfer.so.10", "libtensorrt_rtx.so.1"};

// Where getPluginRegistry is: in this process, in a library that is loaded, else in one that can be loaded.
bool FindTensorRT(void** library) noexcept {
  *library = RTLD_DEFAULT;
  if (dlsym(RTLD_DEFAULT, "getPluginRegistry") != nullptr) return true;
  for (int flags : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY}) {
    for (const char* name : kLibraries) {
      *library = dlopen(name, flags);
      if (*library != nullptr) return true;
    }
  }
  return false;
}

template <typename Function>
Function* Symbol(void* library, const char* name) noexcept {
  return reinterpret_cast<Function*>(dlsym(library, name));
}

bool Register() noexcept {
  void* library = nullptr;
  if (!FindTensorRT(&library)) {
    fptq::LogError("no TensorRT is loaded or found: the plugins are not registered");
    return false;
  }
  auto* get_registry = Symbol<nvinfer1::IPluginRegistry*()>(library, "getPluginRegistry");
  auto* get_major = Symbol<int32_t()>(library, "getInferLibMajorVersion");
  nvinfer1::IPluginRegistry* registry = get_registry != nullptr ? get_registry() : nullptr;
  const int32_t major = get_major != nullptr ? get_major() : 0;
  const int32_t entry = fptq::RegisterCreatorEntry(major);
  if (registry == nullptr || entry == fptq::kUnknownEntry) {
    fptq::LogError(
        "TensorRT %d is not one this library knows (10, 11, RTX 1): the plugins are not registered", major);
    return false;
  }
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* creators = fptq::Creators(&count);
  bool registered = true;
  for (int32_t i = 0; i < count; ++i) {
    registered &= fptq::RegisterCreator(registry, entry, creators[i], fptq::kPluginNamespace);
  }
  if (!registered) fptq::LogError("the registry refused a plugin: is another copy of this library loaded?");
  return registered;
}

const bool kRegistered = Register();

}  // namespace

// Whether the creators are in the registry of the process.
extern "C" __attribute__((visibility("default"))) int fptqIsRegistered() { return kRegistered ? 1 : 0; }
