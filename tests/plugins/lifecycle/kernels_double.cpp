#include "kernels_double.h"

#include <algorithm>
#include <memory>

#include "device.h"

namespace {

std::unique_ptr<KernelsDouble>& Instance() {
  static std::unique_ptr<KernelsDouble> instance = std::make_unique<KernelsDouble>();
  return instance;
}

}  // namespace

KernelsDouble& TheDouble() { return *Instance(); }

void ResetDouble() { Instance() = std::make_unique<KernelsDouble>(); }

namespace fptq {

FptqStatus CurrentOrdinal(int32_t* ordinal) noexcept {
  *ordinal = TheDouble().ordinal;
  return TheDouble().device_status;
}

FptqStatus DeviceFromOrdinal(int32_t ordinal, FptqDevice* device) noexcept {
  ++TheDouble().times_asked;
  *device = TheDouble().device;
  device->multiprocessors += ordinal;
  return TheDouble().properties_status;
}

FptqStatus CurrentDevice(FptqDevice* device) noexcept {
  int32_t ordinal = 0;
  const FptqStatus status = CurrentOrdinal(&ordinal);
  return status == FPTQ_OK ? DeviceFromOrdinal(ordinal, device) : status;
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
