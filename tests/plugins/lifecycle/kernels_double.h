// A double of the kernel boundary: answers what a test told it to and remembers what it was asked.
#ifndef FPTQ_TESTS_KERNELS_DOUBLE_H
#define FPTQ_TESTS_KERNELS_DOUBLE_H

#include <atomic>

#include "fptq/kernels.h"

struct KernelsDouble {
  FptqStatus device_status = FPTQ_UNSUPPORTED_DEVICE;  // of CurrentDevice: a machine without a GPU
  int32_t ordinal = 0;
  FptqStatus properties_status = FPTQ_OK;  // of DeviceFromOrdinal
  FptqDevice device = {80, 108, 166912};   // of ordinal 0; each later one has a multiprocessor more
  std::atomic<int32_t> times_asked = 0;    // for the properties of a device
  FptqStatus candidates_status = FPTQ_OK;
  FptqGemmConfig candidates[8] = {};
  int32_t num_candidates = 0;
  int32_t num_own = 0;  // the first of the candidates, which are offered to `device` only
  FptqStatus linear_status = FPTQ_OK;

  int32_t linear_calls = 0;
  FptqGemmDesc linear_desc = {};
  FptqGemmConfig linear_config = {};
  FptqGemmArgs linear_args = {};
};

// Not for use from two threads while it is being changed.
KernelsDouble& TheDouble();

// As it was in the beginning.
void ResetDouble();

#endif  // FPTQ_TESTS_KERNELS_DOUBLE_H
