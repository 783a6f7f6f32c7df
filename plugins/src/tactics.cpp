#include "tactics.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace fptq {
namespace {

constexpr int32_t kKiB = 1024;
// The largest GPU of each compute capability (NVIDIA data sheets; shared memory: CUDA C++ Programming Guide,
// table "Technical Specifications per Compute Capability"). A larger one still runs: it splits K less than it
// could.
constexpr FptqDevice kReferenceDevices[] = {
    {80, 108, 163 * kKiB},   // A100
    {86, 84, 99 * kKiB},     // A40
    {87, 16, 163 * kKiB},    // Jetson AGX Orin
    {89, 142, 99 * kKiB},    // L40S
    {90, 132, 227 * kKiB},   // H100
    {100, 148, 227 * kKiB},  // B200
    {103, 160, 227 * kKiB},  // B300
    {110, 20, 227 * kKiB},   // Jetson Thor
    {120, 188, 99 * kKiB},   // RTX PRO 6000
    {121, 48, 99 * kKiB},    // GB10
};

struct Candidates {
  FptqGemmConfig configs[kMaxTactics];
  int32_t count = 0;
};

FptqStatus CandidatesFor(const FptqGemmDesc& desc, const FptqDevice& device, Candidates* result) noexcept {
  const FptqStatus status = fptqCandidates(&desc, &device, result->configs, kMaxTactics, &result->count);
  if (status != FPTQ_OK) result->count = 0;
  result->count = std::clamp(result->count, 0, kMaxTactics);
  return status;
}

// FNV-1a (Fowler, Noll, Vo), 32 bits.
uint32_t Hash(uint32_t hash, int32_t value) noexcept {
  for (int shift = 0; shift < 32; shift += 8) {
    hash = (hash ^ ((static_cast<uint32_t>(value) >> shift) & 0xFFu)) * 16777619u;
  }
  return hash;
}

size_t LargestWorkspace(const FptqGemmDesc& desc, const FptqDevice& device) noexcept {
  Candidates candidates;
  CandidatesFor(desc, device, &candidates);
  size_t bytes = 0;
  for (int32_t i = 0; i < candidates.count; ++i) {
    bytes = std::max(bytes, fptqWorkspaceBytes(&desc, &candidates.configs[i]));
  }
  return bytes;
}

// The largest workspace among the probes of WorkspaceBound, or the first that is at least `enough`.
//
// Probes are the powers of two up to the first that is not below m: a larger m adds terms to the maximum and
// removes none. They are tried from the largest down, because it usually decides.
size_t BoundOrEnough(const FptqGemmDesc& desc, size_t enough) noexcept {
  int64_t largest = 1;
  while (largest < desc.m) largest *= 2;
  size_t bytes = 0;
  FptqGemmDesc probe = desc;
  for (int64_t m = largest; m >= 1; m /= 2) {
    probe.m = static_cast<int32_t>(std::min<int64_t>(m, INT32_MAX));
    for (const FptqDevice& device : kReferenceDevices) {
      if (bytes >= enough) return bytes;
      bytes = std::max(bytes, LargestWorkspace(probe, device));
    }
  }
  return bytes;
}

}  // namespace

int32_t TacticFromConfig(const FptqGemmConfig& config) noexcept {
  uint32_t hash = 2166136261u;
  for (int32_t value : {static_cast<int32_t>(config.kernel), config.block_m, config.block_n, config.block_k,
                        config.warp_m, config.warp_n, config.stages, config.split_k}) {
    hash = Hash(hash, value);
  }
  const int32_t tactic = static_cast<int32_t>(hash & 0x7FFFFFFFu);
  return tactic == 0 ? 1 : tactic;
}

int32_t TacticsForProblem(const FptqGemmDesc& desc, const FptqDevice& device,
                          int32_t (&tactics)[kMaxTactics]) noexcept {
  Candidates candidates;
  CandidatesFor(desc, device, &candidates);
  int32_t count = 0;
  for (int32_t i = 0; i < candidates.count; ++i) {
    const int32_t tactic = TacticFromConfig(candidates.configs[i]);
    // TensorRT wants every id once.
    if (std::find(tactics, tactics + count, tactic) == tactics + count) tactics[count++] = tactic;
  }
  return count;
}

size_t WorkspaceBound(const FptqGemmDesc& desc) noexcept { return BoundOrEnough(desc, SIZE_MAX); }

FptqStatus ConfigForCall(const FptqGemmDesc& desc, const FptqDevice& device, int32_t tactic,
                         FptqGemmConfig* config) noexcept {
  if (config == nullptr) return FPTQ_NULL_POINTER;
  Candidates candidates;
  const FptqStatus status = CandidatesFor(desc, device, &candidates);
  if (status != FPTQ_OK) return status;
  if (candidates.count == 0) return FPTQ_BAD_CONFIG;
  const auto end = candidates.configs + candidates.count;
  const auto fits = [&](const FptqGemmConfig& candidate) {
    const size_t bytes = fptqWorkspaceBytes(&desc, &candidate);
    return BoundOrEnough(desc, bytes) >= bytes;
  };
  const auto timed = std::find_if(candidates.configs, end, [&](const FptqGemmConfig& candidate) {
    return tactic != 0 && TacticFromConfig(candidate) == tactic && fits(candidate);
  });
  const auto chosen = timed != end ? timed : std::find_if(candidates.configs, end, fits);
  if (chosen == end) return FPTQ_SMALL_WORKSPACE;
  *config = *chosen;
  return FPTQ_OK;
}

}  // namespace fptq
