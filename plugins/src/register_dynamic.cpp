// Library libfptq_trt.so: loaded by TensorRT itself (IPluginRegistry::loadLibrary, trtexec --dynamicPlugins,
// plugins_to_serialize). It must not register anything: TensorRT refuses a library that does both.
#include "plugin.h"

#define FPTQ_EXPORT __attribute__((visibility("default")))

extern "C" FPTQ_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  return fptq::Creators(&count);
}

// Required by loadLibrary. The finder is not kept: see log.h.
extern "C" FPTQ_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* /*finder*/) {}
