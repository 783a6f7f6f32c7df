// A machine that is a double: a device in the memory of the host (host_device.h), and an engine (engine_double.h) that
// is a tiny language model (tiny_model.h).
//
// The environment variable FPTQ_DOUBLE, pairs of words, says what is there:
//   gpu 0                  there is none
//   compute_capability 8.9
//   target NAME, library_version VERSION: of the library that is found
//   fail_allocation N      allocation N (from 1) fails
//   report 1               on standard error, what was done: calls, captures, launches
//
// The plan of the double: the header of TensorRT for RTX (32 bytes), then pairs of words; see `Spec`.
#ifndef FPTQ_RUN_TESTS_MACHINE_DOUBLE_H
#define FPTQ_RUN_TESTS_MACHINE_DOUBLE_H

#include <memory>

#include "fptq_run/command.h"

namespace fptq_run {

std::unique_ptr<Machine> MachineDouble();

// The device alone.
std::unique_ptr<Device> DeviceDouble(int fail_allocation = 0, bool report = false);

}  // namespace fptq_run

#endif  // FPTQ_RUN_TESTS_MACHINE_DOUBLE_H
