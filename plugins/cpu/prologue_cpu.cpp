// Checks and division of the work; the arithmetic is in prologue_kernels.h.
#include "prologue_cpu.h"

#include <algorithm>
#include <initializer_list>

#include "dispatch.h"

namespace fptq::cpu {
namespace {

// A thread is woken for longer than fewer rows take.
constexpr int32_t kRowsPerThread = 16;

FptqStatus check(int32_t m, int32_t k, std::initializer_list<const void*> pointers,
                 FptqCpuInstructionSet instruction_set) {
  if (std::ranges::find(pointers, nullptr) != pointers.end()) return FPTQ_NULL_POINTER;
  if (m < 1 || k < 1) return FPTQ_BAD_SHAPE;
  return fptqCpuSupports(instruction_set) != 0 ? FPTQ_OK : FPTQ_UNSUPPORTED_DEVICE;
}

template <typename Args>
void for_each_row(const Args& args, void (*work)(const Args& args, int32_t row), const FptqCpuPool& pool) {
  const int32_t chunks = FPTQ_ROUND_UP(args.m, kRowsPerThread) / kRowsPerThread;
  const auto work_on_chunk = [&](int32_t chunk) {
    const int32_t end = std::min(args.m, (chunk + 1) * kRowsPerThread);
    for (int32_t row = chunk * kRowsPerThread; row < end; ++row) work(args, row);
  };
  if (chunks == 1) return work_on_chunk(0);
  run_on(pool, chunks, work_on_chunk);
}

}  // namespace
}  // namespace fptq::cpu

using namespace fptq::cpu;

extern "C" {

FptqStatus fptqCpuSkipNorm(const FptqCpuSkipNorm* args, FptqCpuInstructionSet instruction_set,
                           const FptqCpuPool* pool) {
  if (args == nullptr) return FPTQ_NULL_POINTER;
  const FptqStatus status =
      check(args->m, args->k, {pool, args->x, args->skip, args->gamma, args->sum, args->y}, instruction_set);
  if (status == FPTQ_OK) for_each_row(*args, kernels_of(instruction_set).skip_norm_row, *pool);
  return status;
}

FptqStatus fptqCpuSwiGlu(const FptqCpuSwiGlu* args, FptqCpuInstructionSet instruction_set,
                         const FptqCpuPool* pool) {
  if (args == nullptr) return FPTQ_NULL_POINTER;
  const FptqStatus status = check(args->m, args->k, {pool, args->gate, args->up, args->y}, instruction_set);
  if (status == FPTQ_OK) for_each_row(*args, kernels_of(instruction_set).swi_glu_row, *pool);
  return status;
}

}  // extern "C"
