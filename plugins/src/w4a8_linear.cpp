/* The boundary of the kernels: checks arguments, lays out the workspace, launches. */
#include <cstdint>

#include "config.h"
#include "fptq/kernels.h"
#include "fptq/layout.h"
#include "kernels_internal.h"

namespace fptq {
namespace {

constexpr size_t kWorkspaceAlignment = 256;

size_t aligned(size_t bytes) { return FPTQ_ROUND_UP(bytes, kWorkspaceAlignment); }

/* Byte offsets of the parts of the workspace. */
struct WorkspaceLayout {
  size_t codes = 0;
  size_t scales = 0;
  size_t row_sums = 0;
  size_t partials = 0;
  size_t total = 0;
};

WorkspaceLayout workspace_layout(const FptqGemmDesc& desc, const FptqGemmConfig& config) {
  WorkspaceLayout layout;
  if (config.kernel == FPTQ_KERNEL_GEMV) return layout;
  const size_t m = static_cast<size_t>(desc.m);
  layout.scales = aligned(m * static_cast<size_t>(FPTQ_PADDED_K(desc.k)));
  layout.row_sums = layout.scales + aligned(m * sizeof(float));
  layout.partials = layout.row_sums + (desc.scheme == FPTQ_TWO_LEVEL ? aligned(m * sizeof(int32_t)) : 0);
  layout.total = layout.partials;
  if (config.split_k > 1) {
    layout.total += aligned(static_cast<size_t>(config.split_k) * m *
                            static_cast<size_t>(FPTQ_PADDED_N(desc.n)) * sizeof(uint32_t));
  }
  return layout;
}

bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % FPTQ_POINTER_ALIGNMENT == 0;
}

FptqStatus check_args(const FptqGemmDesc& desc, const FptqGemmArgs& args, size_t workspace_bytes) {
  const bool missing =
      args.x == nullptr || args.weight_codes == nullptr || args.y == nullptr ||
      args.weight_scales == nullptr || (desc.scheme == FPTQ_TWO_LEVEL && args.channel_scales == nullptr) ||
      (desc.activation_mode == FPTQ_STATIC && args.x_scale == nullptr) ||
      (desc.has_bias != 0 && args.bias == nullptr) || (workspace_bytes > 0 && args.workspace == nullptr);
  if (missing) return FPTQ_NULL_POINTER;
  if (!is_aligned(args.weight_codes) || !is_aligned(args.weight_scales) || !is_aligned(args.channel_scales) ||
      !is_aligned(args.y) || !is_aligned(args.workspace)) {
    return FPTQ_BAD_ALIGNMENT;
  }
  return args.workspace_bytes < workspace_bytes ? FPTQ_SMALL_WORKSPACE : FPTQ_OK;
}

FptqStatus run_linear(const FptqGemmDesc& desc, const FptqGemmConfig& config, FptqGemmArgs args,
                      FptqStream stream) {
  if (const FptqStatus status = check_desc(desc); status != FPTQ_OK) return status;
  if (config_error(desc, config) != nullptr) return FPTQ_BAD_CONFIG;
  const WorkspaceLayout layout = workspace_layout(desc, config);
  if (const FptqStatus status = check_args(desc, args, layout.total); status != FPTQ_OK) return status;
  if (desc.has_bias == 0) args.bias = nullptr;
  if (desc.activation_mode == FPTQ_PER_TOKEN) args.x_scale = nullptr;
  if (config.kernel == FPTQ_KERNEL_GEMV) return launch_gemv(desc, args, stream);

  unsigned char* base = static_cast<unsigned char*>(args.workspace);
  Workspace workspace = {};
  workspace.codes = reinterpret_cast<int8_t*>(base + layout.codes);
  workspace.scales = reinterpret_cast<float*>(base + layout.scales);
  if (desc.scheme == FPTQ_TWO_LEVEL) workspace.row_sums = reinterpret_cast<int32_t*>(base + layout.row_sums);
  if (config.split_k > 1) workspace.partials = base + layout.partials;
  const FptqStatus status = launch_quantize(desc, args.x, args.x_scale, workspace.codes, workspace.scales,
                                            workspace.row_sums, stream);
  return status == FPTQ_OK ? launch_gemm(desc, config, args, workspace, stream) : status;
}

}  // namespace
}  // namespace fptq

extern "C" {

size_t fptqWorkspaceBytes(const FptqGemmDesc* desc, const FptqGemmConfig* config) {
  if (desc == nullptr || config == nullptr || fptq::check_desc(*desc) != FPTQ_OK) return 0;
  return fptq::workspace_layout(*desc, *config).total;
}

FptqStatus fptqW4A8Linear(const FptqGemmDesc* desc, const FptqGemmConfig* config, const FptqGemmArgs* args,
                          FptqStream stream) {
  if (desc == nullptr || config == nullptr || args == nullptr) return FPTQ_NULL_POINTER;
  return fptq::run_linear(*desc, *config, *args, stream);
}

FptqStatus fptqQuantizeActivation(const FptqGemmDesc* desc, const void* x, const float* x_scale,
                                  int8_t* codes, float* scales, int32_t* row_sums, FptqStream stream) {
  if (desc == nullptr || x == nullptr || codes == nullptr || scales == nullptr) return FPTQ_NULL_POINTER;
  if (const FptqStatus status = fptq::check_desc(*desc); status != FPTQ_OK) return status;
  const bool is_static = desc->activation_mode == FPTQ_STATIC;
  if (is_static && x_scale == nullptr) return FPTQ_NULL_POINTER;
  if (!fptq::is_aligned(codes)) return FPTQ_BAD_ALIGNMENT;
  return fptq::launch_quantize(*desc, x, is_static ? x_scale : nullptr, codes, scales, row_sums, stream);
}

}  // extern "C"
