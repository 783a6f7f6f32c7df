// TensorRT is looked for among the libraries that are loaded already, so that one library serves TensorRT 10,
// TensorRT 11 and TensorRT for RTX; Python wheels load theirs with RTLD_LOCAL, hence the search by name.
#include <dlfcn.h>

#include "registry_abi.h"

namespace fptq {
namespace {

constexpr const char* kLibraries[] = {"libnvinfer.so.11", "libnvinfer.so.10", "libtensorrt_rtx.so.1"};

template <typename Function>
Function* Symbol(void* library, const char* name) noexcept {
  return reinterpret_cast<Function*>(dlsym(library, name));
}

Registry RegistryOf(void* library) noexcept {
  auto* get_registry = Symbol<nvinfer1::IPluginRegistry*()>(library, "getPluginRegistry");
  auto* get_major = Symbol<int32_t()>(library, "getInferLibMajorVersion");
  return {get_registry != nullptr ? get_registry() : nullptr, get_major != nullptr ? get_major() : 0};
}

}  // namespace

Registry FindLoadedRegistry() noexcept {
  if (dlsym(RTLD_DEFAULT, "getPluginRegistry") != nullptr) return RegistryOf(RTLD_DEFAULT);
  for (const char* name : kLibraries) {
    void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) continue;
    const Registry registry = RegistryOf(library);
    dlclose(library);  // whoever loaded it keeps it
    return registry;
  }
  return {};
}

Registry FindRegistry() noexcept {
  const Registry loaded = FindLoadedRegistry();
  if (loaded.pointer != nullptr || loaded.major != 0) return loaded;
  for (const char* name : kLibraries) {
    if (void* library = dlopen(name, RTLD_LAZY)) return RegistryOf(library);
  }
  return {};
}

}  // namespace fptq
