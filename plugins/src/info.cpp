// What this library was built from, for fptq_export.plugin_info() and for people with `strings`.
#include <NvInferVersion.h>

#include "fptq/layout.h"

#define FPTQ_TEXT_OF(value) #value
#define FPTQ_TEXT(value) FPTQ_TEXT_OF(value)

// JSON, static storage. FPTQ_VERSION, FPTQ_ARCHITECTURES ("80 86 ...") and FPTQ_KERNELS come from the build.
extern "C" __attribute__((visibility("default"))) const char* fptqPluginInfo() {
  return "{\"version\": \"" FPTQ_VERSION "\", \"layout_version\": " FPTQ_TEXT(
      FPTQ_LAYOUT_VERSION) ", \"kernels\": \"" FPTQ_KERNELS "\", \"architectures\": \"" FPTQ_ARCHITECTURES
                           "\", \"tensorrt_headers\": \"" FPTQ_TEXT(NV_TENSORRT_MAJOR) "." FPTQ_TEXT(
                               NV_TENSORRT_MINOR) "\"}";
}
