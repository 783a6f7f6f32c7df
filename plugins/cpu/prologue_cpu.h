/* What stands before a linear of a decoder, on x86 CPUs, in FP32. C linkage, host pointers, a status. Arrays are row-major
 * [m, k] where nothing else is said; the rows are divided among the threads of `pool`. */
#ifndef FPTQ_CPU_PROLOGUE_CPU_H
#define FPTQ_CPU_PROLOGUE_CPU_H

#include "w4a8_cpu.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct FptqCpuSkipNorm {
  int32_t m, k;
  const float* x;
  const float* skip;
  const float* gamma; /* [k] */
  float epsilon;
  float* sum; /* x + skip */
  float* y;   /* sum / sqrt(mean(sum^2) + epsilon) * gamma, means over a row */
} FptqCpuSkipNorm;

typedef struct FptqCpuSwiGlu {
  int32_t m, k;
  const float* gate;
  const float* up;
  float* y; /* gate / (1 + e^-gate) * up */
} FptqCpuSwiGlu;

/* The order of a sum depends on the instruction set, and on nothing else. */
FptqStatus fptqCpuSkipNorm(const FptqCpuSkipNorm* args, FptqCpuInstructionSet instruction_set,
                           const FptqCpuPool* pool);
FptqStatus fptqCpuSwiGlu(const FptqCpuSwiGlu* args, FptqCpuInstructionSet instruction_set,
                         const FptqCpuPool* pool);

#ifdef __cplusplus
}
#endif
#endif /* FPTQ_CPU_PROLOGUE_CPU_H */
