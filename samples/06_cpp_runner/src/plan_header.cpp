#include "plan_header.h"

#include <array>
#include <filesystem>
#include <fstream>
#include <string_view>

namespace fptq_run {
namespace {

constexpr std::size_t kHeaderBytes = 32;
constexpr std::size_t kSizeAt = 16;
constexpr std::size_t kVersionAt = 24;

struct Magic {
  std::string_view start;
  const char* words;
};
// What is taken for an engine by mistake.
constexpr std::array<Magic, 6> kOthers{
    {{"version https://git-lfs", "a pointer of Git LFS, not the file itself"},
     {"PK\x03\x04", "a ZIP archive"},
     {"{", "JSON text"},
     {"<", "HTML or XML text"},
     {"\x7f"
      "ELF",
      "a shared library or program"},
     {std::string_view("\0\0\0\0", 4), "filled with zeros, as after an aborted copy"}}};

std::string StartOf(const std::string& path) {
  std::array<char, kHeaderBytes> start{};
  std::ifstream file(path, std::ios::binary);
  file.read(start.data(), start.size());
  return {start.data(), static_cast<std::size_t>(file.gcount())};
}

}  // namespace

std::optional<PlanHeader> HeaderFromFile(const std::string& path) {
  const std::string start = StartOf(path);
  if (!start.starts_with("vtrt") || start.size() < kHeaderBytes) return std::nullopt;
  PlanHeader header;
  for (std::size_t byte = 8; byte-- > 0;) {
    header.file_bytes = (header.file_bytes << 8U) | static_cast<unsigned char>(start[kSizeAt + byte]);
  }
  for (std::size_t part = 0; part < 4; ++part) {
    header.library_version +=
        (part == 0 ? "" : ".") + std::to_string(static_cast<unsigned char>(start[kVersionAt + part]));
  }
  return header;
}

std::optional<std::string> WhatInstead(const std::string& path) {
  const std::string start = StartOf(path);
  if (start.empty()) return "empty";
  for (const Magic& magic : kOthers) {
    if (start.starts_with(magic.start)) return magic.words;
  }
  if (std::filesystem::path(path).extension() == ".onnx") {
    return "an ONNX graph, from which an engine is yet to be built";
  }
  if (start.size() < kHeaderBytes) return "only " + std::to_string(start.size()) + " bytes long";
  if (start.substr(0, 8).find("trt") == std::string::npos) return "of no kind that TensorRT writes";
  return std::nullopt;
}

}  // namespace fptq_run
