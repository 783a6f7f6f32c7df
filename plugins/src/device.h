// What the choice of a kernel needs to know about the GPU of the calling thread.
#ifndef FPTQ_SRC_DEVICE_H
#define FPTQ_SRC_DEVICE_H

#include "fptq/kernels.h"

namespace fptq {

// FPTQ_UNSUPPORTED_DEVICE where there is no GPU or no driver: engines are also built on such machines.
FptqStatus CurrentDevice(FptqDevice* device) noexcept;

}  // namespace fptq

#endif  // FPTQ_SRC_DEVICE_H
