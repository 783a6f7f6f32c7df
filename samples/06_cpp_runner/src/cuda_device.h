// The GPU through NVIDIA's driver library, libcuda.so.1, which every machine with a GPU has; no toolkit is needed.
#ifndef FPTQ_RUN_SRC_CUDA_DEVICE_H
#define FPTQ_RUN_SRC_CUDA_DEVICE_H

#include <memory>

#include "fptq_run/device.h"

namespace fptq_run {

class StreamDevice : public Device {
 public:
  // A CUstream, which is the runtime's cudaStream_t too.
  [[nodiscard]] virtual void* Stream() const = 0;
};

// The first GPU that CUDA_VISIBLE_DEVICES leaves. Throws Error where there is none.
std::unique_ptr<StreamDevice> OpenCudaDevice();

}  // namespace fptq_run

#endif  // FPTQ_RUN_SRC_CUDA_DEVICE_H
