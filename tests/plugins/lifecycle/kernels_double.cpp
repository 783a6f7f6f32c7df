#include "kernels_double.h"

#include <algorithm>

#include "device.h"

KernelsDouble& TheDouble() {
  static KernelsDouble instance;
  return instance;
}

namespace fptq {

FptqStatus CurrentDevice(FptqDevice* device) noexcept {
  *device = TheDouble().device;
  return TheDouble().device_status;
}

}  // namespace fptq

extern "C" {

FptqStatus fptqCandidates(const FptqGemmDesc*, const FptqDevice* device, FptqGemmConfig* configs,
                          int32_t capacity, int32_t* count) {
  const KernelsDouble& the_double = TheDouble();
  const bool own = device->multiprocessors == the_double.device.multiprocessors;
  const FptqGemmConfig* first = the_double.candidates + (own ? 0 : the_double.num_own);
  *count = std::min<int32_t>(capacity, the_double.candidates + the_double.num_candidates - first);
  std::copy(first, first + *count, configs);
  return the_double.candidates_status;
}

FptqStatus fptqChooseConfig(const FptqGemmDesc* desc, const FptqDevice* device, FptqGemmConfig* config) {
  int32_t count = 0;
  const FptqStatus status = fptqCandidates(desc, device, config, 1, &count);
  return status == FPTQ_OK && count == 0 ? FPTQ_UNSUPPORTED_DEVICE : status;
}

// Codes and scales of the activation, and partial sums for split-K.
size_t fptqWorkspaceBytes(const FptqGemmDesc* desc, const FptqGemmConfig* config) {
  const size_t m = static_cast<size_t>(desc->m);
  const size_t partial = config->split_k > 1 ? m * desc->n * config->split_k * sizeof(float) : 0;
  return m * FPTQ_PADDED_K(desc->k) + m * sizeof(float) + partial;
}

FptqStatus fptqW4A8Linear(const FptqGemmDesc* desc, const FptqGemmConfig* config, const FptqGemmArgs* args,
                          FptqStream) {
  KernelsDouble& the_double = TheDouble();
  ++the_double.linear_calls;
  the_double.linear_desc = *desc;
  the_double.linear_config = *config;
  the_double.linear_args = *args;
  return the_double.linear_status;
}

FptqStatus fptqQuantizeActivation(const FptqGemmDesc*, const void*, const float*, int8_t*, float*, int32_t*,
                                  FptqStream) {
  return FPTQ_UNSUPPORTED_DEVICE;
}

}  // extern "C"
