#include "kernels_internal.h"
#include "launch.h"
#include "w4a8_gemv.cuh"

namespace fptq {
namespace {

template <class S>
FptqStatus launch_rows(const FptqGemmDesc& desc, const GemvParams& params, FptqStream stream) {
  const uint32_t blocks = static_cast<uint32_t>(params.padded_n / FPTQ_TILE_N);
  const size_t bytes = gemv_shared_bytes(desc);
  switch (desc.m) {
    case 1:
      return launch(w4a8_gemv_kernel<1, S>, blocks, 1, kGemvThreads, bytes, stream, params);
    case 2:
      return launch(w4a8_gemv_kernel<2, S>, blocks, 1, kGemvThreads, bytes, stream, params);
    case 3:
      return launch(w4a8_gemv_kernel<3, S>, blocks, 1, kGemvThreads, bytes, stream, params);
    case kGemvMaxRows:
      return launch(w4a8_gemv_kernel<kGemvMaxRows, S>, blocks, 1, kGemvThreads, bytes, stream, params);
    default:
      return FPTQ_BAD_CONFIG;
  }
}

}  // namespace

size_t gemv_shared_bytes(const FptqGemmDesc& desc) { return gemv_bytes(desc.m, FPTQ_PADDED_K(desc.k)); }

FptqStatus launch_gemv(const FptqGemmDesc& desc, const FptqGemmArgs& args, FptqStream stream) {
  const bool bfloat16 = desc.output_type == FPTQ_BFLOAT16;
  GemvParams params = {};
  params.source = {
      args.x, args.x_scale, desc.k, FPTQ_PADDED_K(desc.k), bfloat16, rows_are_aligned(desc, args.x)};
  params.b = static_cast<const unsigned char*>(args.weight_codes);
  params.s = static_cast<const uint16_t*>(args.weight_scales);
  params.out = {args.weight_scales, args.channel_scales, args.bias, args.y, desc.n, bfloat16};
  params.padded_n = FPTQ_PADDED_N(desc.n);
  params.num_k_tiles = FPTQ_PADDED_K(desc.k) / FPTQ_TILE_K;
  params.num_groups = desc.group_size > 0 ? desc.k / desc.group_size : 1;

#define FPTQ_SCHEME(KIND, GROUP)                                   \
  if (desc.scheme == KIND && desc.group_size == GROUP) {           \
    return launch_rows<Scheme<KIND, GROUP>>(desc, params, stream); \
  }
  FPTQ_SCHEMES(FPTQ_SCHEME)
#undef FPTQ_SCHEME
  return FPTQ_BAD_GROUP_SIZE;
}

}  // namespace fptq
