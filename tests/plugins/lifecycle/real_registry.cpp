// The shared resource in the registry of a TensorRT that the caller has loaded, as a library for ctypes.
#include <cstdio>

#include "device_resource.h"
#include "kernels_double.h"

// Returns how often the properties were asked for by two holders, in two lives of the resource; a negative
// number where one of them did not get hold of it.
extern "C" __attribute__((visibility("default"))) int32_t holdTwice() {
  TheDouble().device_status = FPTQ_OK;
  for (int32_t life = 0; life < 2; ++life) {
    fptq::SharedDevices holders[2];
    for (fptq::SharedDevices& holder : holders) {
      holder.Acquire(fptq::FindLoadedRegistry());
      if (!holder.IsHeld()) return -1;
      FptqDevice device{};
      if (holder.Current(&device) != FPTQ_OK || device.multiprocessors != 108) return -2;
    }
  }
  return TheDouble().times_asked;
}
