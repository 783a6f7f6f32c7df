// Checks and division of the work; the arithmetic is in attention_kernels.h.
#include "attention_cpu.h"

#include <algorithm>

#include "dispatch.h"

namespace fptq::cpu {
namespace {

// Rows that share what is read of the cache. A single token has few rows: each is work for a thread.
constexpr int32_t kRowsOfPrompt = 16;
// Fewer new keys than this are written at once; a thread would be woken for longer.
constexpr int32_t kTokensPerThread = 16;

FptqStatus check(const FptqCpuAttention& args) {
  for (const void* pointer : {args.q, args.k, args.v, static_cast<const float*>(args.keys),
                              static_cast<const float*>(args.values), static_cast<const float*>(args.y)}) {
    if (pointer == nullptr) return FPTQ_NULL_POINTER;
  }
  if ((args.cosines == nullptr) != (args.sines == nullptr)) return FPTQ_NULL_POINTER;
  if (args.batch < 1 || args.tokens < 1 || args.kv_heads < 1 || args.heads < 1 ||
      args.heads % args.kv_heads != 0)
    return FPTQ_BAD_SHAPE;
  if (args.size < 1 || args.size % kPanel != 0 || args.size > kMaxHeadSize) return FPTQ_BAD_SHAPE;
  if (args.slots % kPanel != 0 || args.past < 0 || args.past > args.slots - args.tokens)
    return FPTQ_BAD_SHAPE;
  const int64_t rows = int64_t{args.tokens} * (args.heads / args.kv_heads),
                heads = int64_t{args.batch} * args.kv_heads;
  return rows * heads > INT32_MAX ? FPTQ_BAD_SHAPE : FPTQ_OK;
}

void store(const FptqCpuAttention& args, const Kernels& kernels, const FptqCpuPool& pool) {
  const int32_t heads = args.batch * args.kv_heads;
  const auto store_head = [&](int32_t head) { kernels.store_head(args, head); };
  if (args.tokens >= kTokensPerThread) return run_on(pool, heads, store_head);
  for (int32_t head = 0; head < heads; ++head) store_head(head);
}

void attend(const FptqCpuAttention& args, const Kernels& kernels, const FptqCpuPool& pool) {
  const int32_t rows = args.tokens * (args.heads / args.kv_heads);
  const int32_t rows_at_once = args.tokens == 1 ? 1 : kRowsOfPrompt;
  const int32_t blocks = (rows + rows_at_once - 1) / rows_at_once;
  run_on(pool, args.batch * args.kv_heads * blocks, [&](int32_t index) {
    const int32_t first = index % blocks * rows_at_once;
    kernels.attend_rows(args, index / blocks, first, std::min(rows_at_once, rows - first));
  });
}

}  // namespace
}  // namespace fptq::cpu

using namespace fptq::cpu;

extern "C" FptqStatus fptqCpuAttention(const FptqCpuAttention* args, FptqCpuInstructionSet instruction_set,
                                       const FptqCpuPool* pool) {
  if (args == nullptr || pool == nullptr) return FPTQ_NULL_POINTER;
  if (const FptqStatus status = check(*args); status != FPTQ_OK) return status;
  if (fptqCpuSupports(instruction_set) == 0) return FPTQ_UNSUPPORTED_DEVICE;
  const Kernels& kernels = kernels_of(instruction_set);
  store(*args, kernels, *pool);
  attend(*args, kernels, *pool);
  return FPTQ_OK;
}
