// One call of an engine on given inputs: `polygraphy run --trt --load-inputs --save-outputs` without Python.
#ifndef FPTQ_RUN_SINGLE_CALL_H
#define FPTQ_RUN_SINGLE_CALL_H

#include "fptq_run/device.h"
#include "fptq_run/engine.h"
#include "fptq_run/polygraphy_files.h"

namespace fptq_run {

// Every output, in the order of the engine. `present.*` of a static cache is written over its input on the device.
// Throws Error where an input is missing, unknown, of another type, or of a shape that no profile allows.
IterationResult RunOnce(Device& device, Engine& engine, const NamedTensors& inputs);

}  // namespace fptq_run

#endif  // FPTQ_RUN_SINGLE_CALL_H
