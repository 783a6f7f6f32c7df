#include "kernels_internal.h"
#include "launch.h"
#include "split_k_reduce.cuh"
#include "w4a8_gemm.cuh"

namespace fptq {
namespace {

template <class T, class S>
FptqStatus launch_tile(const GemmParams& params, FptqStream stream) {
  if constexpr (tile_is_offered(T::WARP_M, T::WARP_N, S::kKind, S::kGroupSize)) {
    const int tiles_m = (params.m + T::BLOCK_M - 1) / T::BLOCK_M;
    const int tiles_n = (params.padded_n + T::BLOCK_N - 1) / T::BLOCK_N;
    return launch(w4a8_gemm_kernel<T, S>, static_cast<uint32_t>(tiles_m) * static_cast<uint32_t>(tiles_n),
                  static_cast<uint32_t>(params.split_k), T::kNumThreads, GemmShared<T, S>::kBytes, stream,
                  params);
  } else {
    return FPTQ_BAD_CONFIG;
  }
}

template <class S>
FptqStatus launch_scheme(const FptqGemmConfig& config, const GemmParams& params, FptqStream stream) {
#define FPTQ_GEMM_TILE(BM, BN, WM, WN, STAGES)                                                      \
  if (config.block_m == BM && config.block_n == BN && config.warp_m == WM && config.warp_n == WN && \
      config.stages == STAGES) {                                                                    \
    return launch_tile<GemmTile<BM, BN, WM, WN, STAGES>, S>(params, stream);                        \
  }
  FPTQ_GEMM_TILES(FPTQ_GEMM_TILE)
#undef FPTQ_GEMM_TILE
  return FPTQ_BAD_CONFIG;
}

FptqStatus launch_reduce(FptqScheme kind, const GemmParams& gemm, FptqStream stream) {
  const ReduceParams params = {gemm.partials, gemm.row_scales, gemm.row_sums, gemm.out,
                               gemm.m,        gemm.padded_n,   gemm.split_k};
  const uint32_t rows = static_cast<uint32_t>(gemm.m);
  const uint32_t parts = (static_cast<uint32_t>(gemm.out.n) / 2 + kReduceThreads - 1) / kReduceThreads;
  switch (kind) {
    case FPTQ_PER_CHANNEL:
      return launch(split_k_reduce_kernel<FPTQ_PER_CHANNEL>, rows, parts, kReduceThreads, 0, stream, params);
    case FPTQ_GROUP:
      return launch(split_k_reduce_kernel<FPTQ_GROUP>, rows, parts, kReduceThreads, 0, stream, params);
    case FPTQ_TWO_LEVEL:
      return launch(split_k_reduce_kernel<FPTQ_TWO_LEVEL>, rows, parts, kReduceThreads, 0, stream, params);
  }
  return FPTQ_BAD_CONFIG;
}

}  // namespace

FptqStatus launch_gemm(const FptqGemmDesc& desc, const FptqGemmConfig& config, const FptqGemmArgs& args,
                       const Workspace& workspace, FptqStream stream) {
  GemmParams params = {};
  params.a = workspace.codes;
  params.b = static_cast<const unsigned char*>(args.weight_codes);
  params.s = static_cast<const unsigned char*>(args.weight_scales);
  params.row_scales = workspace.scales;
  params.row_sums = workspace.row_sums;
  params.partials = static_cast<uint32_t*>(workspace.partials);
  params.out = {
      args.weight_scales, args.channel_scales, args.bias, args.y, desc.n, desc.output_type == FPTQ_BFLOAT16};
  params.m = desc.m;
  params.padded_n = FPTQ_PADDED_N(desc.n);
  params.num_k_tiles = FPTQ_PADDED_K(desc.k) / FPTQ_TILE_K;
  params.num_groups = desc.group_size > 0 ? desc.k / desc.group_size : 1;
  params.split_k = config.split_k;

  FptqStatus status = FPTQ_BAD_GROUP_SIZE;
#define FPTQ_SCHEME(KIND, GROUP)                                         \
  if (desc.scheme == KIND && desc.group_size == GROUP) {                 \
    status = launch_scheme<Scheme<KIND, GROUP>>(config, params, stream); \
  }
  FPTQ_SCHEMES(FPTQ_SCHEME)
#undef FPTQ_SCHEME
  if (status != FPTQ_OK || params.partials == nullptr) return status;
  return launch_reduce(desc.scheme, params, stream);
}

}  // namespace fptq
