// What every entry point needs: the kernels of an instruction set, and the threads of the caller.
#ifndef FPTQ_CPU_DISPATCH_H
#define FPTQ_CPU_DISPATCH_H

#include "kernels.h"

namespace fptq::cpu {

inline const Kernels& kernels_of(FptqCpuInstructionSet instruction_set) {
#ifdef FPTQ_CPU_X86
  if (instruction_set == FPTQ_CPU_AVX512_VNNI) return kAvx512VnniKernels;
  if (instruction_set == FPTQ_CPU_AVX2) return kAvx2Kernels;
#else
  static_cast<void>(instruction_set);
#endif
  return kScalarKernels;
}

// Runs work(0) .. work(count - 1) on the threads of the caller.
template <typename Work>
void run_on(const FptqCpuPool& pool, int32_t count, const Work& work) {
  const auto call = [](void* data, size_t index) {
    (*static_cast<const Work*>(data))(static_cast<int32_t>(index));
  };
  pool.run(pool.context, static_cast<size_t>(count), call, const_cast<Work*>(&work));
}

}  // namespace fptq::cpu

#endif  // FPTQ_CPU_DISPATCH_H
