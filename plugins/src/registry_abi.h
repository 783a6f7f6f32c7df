// Finding the registry of a TensorRT, and calling it when its major version is known only at run time.
//
// TensorRT 11 removed the IPluginCreator overloads from IPluginRegistry, which moved every later entry of its
// virtual table: a library compiled with the headers of one major crashes in the registry of the other. The
// interfaces this library needs, IPluginCreatorInterface, IPluginResource and strings, are the same in both.
// So entries are called by their number.
#ifndef FPTQ_SRC_REGISTRY_ABI_H
#define FPTQ_SRC_REGISTRY_ABI_H

#include <NvInferRuntime.h>

#include <cstdint>

namespace fptq {

inline constexpr int32_t kUnknownEntry = -1;

// Entry of registerCreator(IPluginCreatorInterface&, const char*), counted in the Itanium C++ ABI, by which
// TensorRT is built on Linux. Major 1 is TensorRT for RTX, which has the table of TensorRT 11 (measured on
// 1.7.1). kUnknownEntry: older than TensorRT 10, which has no IPluginV3, or newer than what is known.
constexpr int32_t RegisterCreatorEntry(int32_t major) noexcept {
  if (major == 10) return 12;
  return major == 11 || major == 1 ? 8 : kUnknownEntry;
}

// Entries of acquirePluginResource(const char*, IPluginResource*) and releasePluginResource(const char*): the
// fourth and fifth after that of registerCreator in every known version (measured on TensorRT for RTX 1.7.1).
constexpr int32_t AcquireResourceEntry(int32_t major) noexcept {
  const int32_t entry = RegisterCreatorEntry(major);
  return entry == kUnknownEntry ? kUnknownEntry : entry + 4;
}

constexpr int32_t ReleaseResourceEntry(int32_t major) noexcept {
  const int32_t entry = RegisterCreatorEntry(major);
  return entry == kUnknownEntry ? kUnknownEntry : entry + 5;
}

// The registry of a process. `major` 0: TensorRT was not found.
struct Registry {
  nvinfer1::IPluginRegistry* pointer = nullptr;
  int32_t major = 0;
};

// The registry of the TensorRT that is loaded: of this process, else of a library loaded under one of its
// names.
Registry FindLoadedRegistry() noexcept;

// As FindLoadedRegistry; where none is loaded, one that the loader finds is loaded, and stays.
Registry FindRegistry() noexcept;

template <typename Function>
Function RegistryEntry(const Registry& registry, int32_t entry) noexcept {
  const Function* table = *reinterpret_cast<const Function* const*>(registry.pointer);
  return table[entry];
}

// False where the registry refuses the creator or is of an unknown major.
inline bool RegisterCreator(const Registry& registry, nvinfer1::IPluginCreatorInterface* creator,
                            const char* plugin_namespace) noexcept {
  using Function = bool (*)(nvinfer1::IPluginRegistry*, nvinfer1::IPluginCreatorInterface*, const char*);
  const int32_t entry = RegisterCreatorEntry(registry.major);
  if (registry.pointer == nullptr || entry == kUnknownEntry) return false;
  return RegistryEntry<Function>(registry, entry)(registry.pointer, creator, plugin_namespace);
}

// The resource that is registered under `key`: the registry's clone of the first one given. Null where there
// is none. Counts a hold, which ReleaseResource gives back.
inline nvinfer1::IPluginResource* AcquireResource(const Registry& registry, const char* key,
                                                  nvinfer1::IPluginResource* resource) noexcept {
  using Function = nvinfer1::IPluginResource* (*)(nvinfer1::IPluginRegistry*, const char*,
                                                  nvinfer1::IPluginResource*);
  const int32_t entry = AcquireResourceEntry(registry.major);
  if (registry.pointer == nullptr || entry == kUnknownEntry) return nullptr;
  return RegistryEntry<Function>(registry, entry)(registry.pointer, key, resource);
}

// The registry frees the resource with the last hold. Returns 0 for success.
inline int32_t ReleaseResource(const Registry& registry, const char* key) noexcept {
  using Function = int32_t (*)(nvinfer1::IPluginRegistry*, const char*);
  const int32_t entry = ReleaseResourceEntry(registry.major);
  if (registry.pointer == nullptr || entry == kUnknownEntry) return 1;
  return RegistryEntry<Function>(registry, entry)(registry.pointer, key);
}

}  // namespace fptq

#endif  // FPTQ_SRC_REGISTRY_ABI_H
