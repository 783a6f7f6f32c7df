// What the choice of a kernel needs to know about the GPU of the calling thread.
#ifndef FPTQ_SRC_DEVICE_H
#define FPTQ_SRC_DEVICE_H

#include "fptq/kernels.h"

namespace fptq {

// Number of the GPU that the calling thread uses. FPTQ_UNSUPPORTED_DEVICE where there is no GPU or no driver:
// engines are also built on such machines. FPTQ_CUDA_ERROR for any other failure.
FptqStatus CurrentOrdinal(int32_t* ordinal) noexcept;

// Properties of the GPU of a number; they never change. FPTQ_UNSUPPORTED_DEVICE for one that no kernel runs
// on.
FptqStatus DeviceFromOrdinal(int32_t ordinal, FptqDevice* device) noexcept;

// Both in one.
FptqStatus CurrentDevice(FptqDevice* device) noexcept;

}  // namespace fptq

#endif  // FPTQ_SRC_DEVICE_H
