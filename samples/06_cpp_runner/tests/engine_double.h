// An engine of the tiny model.
#ifndef FPTQ_RUN_TESTS_ENGINE_DOUBLE_H
#define FPTQ_RUN_TESTS_ENGINE_DOUBLE_H

#include <memory>

#include "fptq_run/engine.h"
#include "host_device.h"
#include "tiny_model.h"

namespace fptq_run {

// It refuses shapes outside its profiles, addresses that are missing, and those that do not fit the form of the cache.
std::unique_ptr<Engine> TinyModelEngine(const Spec& spec, HostDevice& device);

}  // namespace fptq_run

#endif  // FPTQ_RUN_TESTS_ENGINE_DOUBLE_H
