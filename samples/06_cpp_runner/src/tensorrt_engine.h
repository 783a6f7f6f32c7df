// An engine in TensorRT or TensorRT for RTX, whose library is opened at run time.
#ifndef FPTQ_RUN_SRC_TENSORRT_ENGINE_H
#define FPTQ_RUN_SRC_TENSORRT_ENGINE_H

#include <memory>
#include <string>

#include "cuda_device.h"
#include "fptq_run/engine.h"
#include "fptq_run/plan_check.h"
#include "shared_library.h"

namespace fptq_run {

// `path` is a library file; empty looks for the target's names on the loader's path. Throws Error.
SharedLibrary OpenTensorRt(const std::string& target, const std::string& path);

// Which library it is. Throws Error where it is none of TensorRT's.
LibraryFacts FactsOf(const SharedLibrary& library);

// Loads an engine; the library must have the major version of the headers this was compiled with, since their
// tables of virtual functions differ between majors. `plugin` is libfptq_trt.so, kEmbedded or empty. Throws Error
// with what TensorRT says.
std::unique_ptr<Engine> LoadEngine(const SharedLibrary& library, const std::string& plan,
                                   const std::string& plugin, StreamDevice& device);

}  // namespace fptq_run

#endif  // FPTQ_RUN_SRC_TENSORRT_ENGINE_H
