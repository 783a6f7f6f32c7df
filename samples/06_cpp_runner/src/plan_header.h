// The first bytes of an engine file, as far as they are certain (fptq_export/build/plan_header.py).
#ifndef FPTQ_RUN_SRC_PLAN_HEADER_H
#define FPTQ_RUN_SRC_PLAN_HEADER_H

#include <cstdint>
#include <optional>
#include <string>

namespace fptq_run {

// Of a TensorRT for RTX engine.
struct PlanHeader {
  std::string library_version;
  std::uint64_t file_bytes = 0;
};

std::optional<PlanHeader> HeaderFromFile(const std::string& path);

// What a file is that is no engine, in words; nothing where it may be one of a library whose header is not known.
std::optional<std::string> WhatInstead(const std::string& path);

}  // namespace fptq_run

#endif  // FPTQ_RUN_SRC_PLAN_HEADER_H
