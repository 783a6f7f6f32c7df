// A machine that is a double: a device in the memory of the host, and an engine that is a tiny language model.
//
// The environment variable FPTQ_DOUBLE, pairs of words, says what is there:
//   gpu 0                  there is none
//   compute_capability 8.9
//   target NAME, library_version VERSION: of the library that is found
//   fail_allocation N      allocation N (from 1) fails
//   report 1               on standard error, what was done: calls, captures, launches
//
// The plan of the double: the header of TensorRT for RTX (32 bytes), then pairs of words; see `Spec`.
//
// The model. Token t at position p has, in layer l, kind c (0 key, 1 value), head h, column d, the integer
//   x = (7 t + 3 p + 5 l + 11 c + 2 h + d) mod 13 - 6,
// stored as it is, or as INT8 code x / scale with scale = 1 for odd t and 0.5 for even t. Of a query at slot q,
//   sum = (s + 1) ((l + 1) key + (h + 1) value), over all l, h, d and slots s <= q that the mask does not hide,
//   logit v = ((sum (v + 3) + 5 position + v v) mod 101) / 8.
// It reads keys and values from the cache, so a wrong buffer, shape, index or mask gives other tokens.
#ifndef FPTQ_RUN_TESTS_MACHINE_DOUBLE_H
#define FPTQ_RUN_TESTS_MACHINE_DOUBLE_H

#include <memory>

#include "fptq_run/command.h"

namespace fptq_run {

std::unique_ptr<Machine> MachineDouble();

// A device in the memory of the host. Work is done at Synchronize, not before. New memory is full of NaN. Its end
// aborts the process where memory was not freed.
std::unique_ptr<Device> DeviceDouble(int fail_allocation = 0, bool report = false);

}  // namespace fptq_run

#endif  // FPTQ_RUN_TESTS_MACHINE_DOUBLE_H
