// Registering a creator in a TensorRT whose major version is known only when the library is loaded.
//
// TensorRT 11 removed the IPluginCreator overloads from IPluginRegistry, which moved every later entry of its
// virtual table: a library compiled with the headers of one major crashes in the registry of the other. The
// two interfaces this library needs, IPluginCreatorInterface and its strings, are the same in both. So the
// entry is called by its number.
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

inline bool RegisterCreator(nvinfer1::IPluginRegistry* registry, int32_t entry,
                            nvinfer1::IPluginCreatorInterface* creator,
                            const char* plugin_namespace) noexcept {
  using Function = bool (*)(nvinfer1::IPluginRegistry*, nvinfer1::IPluginCreatorInterface*, const char*);
  const Function* table = *reinterpret_cast<const Function* const*>(registry);
  return table[entry](registry, creator, plugin_namespace);
}

}  // namespace fptq

#endif  // FPTQ_SRC_REGISTRY_ABI_H
