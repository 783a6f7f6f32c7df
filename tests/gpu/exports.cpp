// The boundary of the kernels by name, for ctypes: its functions are hidden in the plugin libraries.
#include <cstring>

#include "fptq/kernels.h"

extern "C" __attribute__((visibility("default"))) const void* fptqBoundary(const char* name) {
  struct Function {
    const char* name;
    const void* address;
  };
#define FPTQ_FUNCTION(name) {#name, reinterpret_cast<const void*>(&name)}
  const Function functions[] = {
      FPTQ_FUNCTION(fptqChooseConfig),   FPTQ_FUNCTION(fptqCandidates), FPTQ_FUNCTION(fptqExplainConfigs),
      FPTQ_FUNCTION(fptqWorkspaceBytes), FPTQ_FUNCTION(fptqW4A8Linear), FPTQ_FUNCTION(fptqQuantizeActivation),
      FPTQ_FUNCTION(fptqStatusMessage)};
  for (const Function& function : functions) {
    if (std::strcmp(function.name, name) == 0) return function.address;
  }
  return nullptr;
}
