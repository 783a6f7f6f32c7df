// Between TensorRT's tactics and the configurations of the kernel boundary. Pure host code, no TensorRT.
#ifndef FPTQ_SRC_TACTICS_H
#define FPTQ_SRC_TACTICS_H

#include "fptq/kernels.h"

namespace fptq {

constexpr int32_t kMaxTactics = 32;

// Number that names a configuration: never 0 (TensorRT's default tactic), the same on every device and in
// every run, so that a tactic timed at build time is recognised when the engine runs.
int32_t TacticFromConfig(const FptqGemmConfig& config) noexcept;

// Tactics for a problem on a device, best guess first; returns how many (0 where no kernel runs on the
// device).
int32_t TacticsForProblem(const FptqGemmDesc& desc, const FptqDevice& device,
                          int32_t (&tactics)[kMaxTactics]) noexcept;

// Workspace, in bytes, that is enough for every m <= desc.m on every supported device.
//
// TensorRT asks once, for the largest m of a profile, possibly on a machine without a GPU, and does not say
// at run time how much it gave. So this bound grows with m and depends on nothing but the problem: whoever
// was granted the bound of the largest m may use the bound of the actual one.
size_t WorkspaceBound(const FptqGemmDesc& desc) noexcept;

// Configuration of one call: the timed tactic where the kernels offer it for this m and device, else the best
// one; of those whose workspace is within WorkspaceBound. `tactic` 0 asks for the best. The same call always
// gets the same one.
FptqStatus ConfigForCall(const FptqGemmDesc& desc, const FptqDevice& device, int32_t tactic,
                         FptqGemmConfig* config) noexcept;

}  // namespace fptq

#endif  // FPTQ_SRC_TACTICS_H
