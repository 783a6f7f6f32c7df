/* Attention with a KV cache in place, on x86 CPUs, in FP32. C linkage, host pointers, a status. */
#ifndef FPTQ_CPU_ATTENTION_CPU_H
#define FPTQ_CPU_ATTENTION_CPU_H

#include "w4a8_cpu.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FPTQ_CPU_PANEL 16 /* tokens of keys that lie side by side */
#define FPTQ_CPU_MAX_HEAD_SIZE 256

/* A token sees the cache up to itself. Pointers are row-major FP32. */
typedef struct FptqCpuAttention {
  const float* q; /* [batch, tokens, heads * size] */
  const float* k; /* [batch, tokens, kv_heads * size] */
  const float* v; /* as k */
  /* [batch, tokens, size / 2] each, of the angles that the halves of q and k are turned by; or null: they are already. */
  const float* cosines;
  const float* sines;
  float* keys; /* [batch, kv_heads, slots / FPTQ_CPU_PANEL, size, FPTQ_CPU_PANEL], the new ones are written */
  float* values; /* [batch, kv_heads, slots, size], as above */
  float* y;      /* [batch, tokens, heads * size] */
  float scale;   /* of the scores */
  int32_t batch, tokens;
  int32_t heads; /* a multiple of kv_heads */
  int32_t kv_heads;
  int32_t size;  /* of a head: a multiple of FPTQ_CPU_PANEL up to FPTQ_CPU_MAX_HEAD_SIZE */
  int32_t slots; /* of the cache, a multiple of FPTQ_CPU_PANEL */
  int32_t past;  /* tokens in the cache; past + tokens <= slots */
} FptqCpuAttention;

/* The bits of a row depend on the instruction set, and not on the other rows, `slots` or the threads. */
FptqStatus fptqCpuAttention(const FptqCpuAttention* args, FptqCpuInstructionSet instruction_set,
                            const FptqCpuPool* pool);

#ifdef __cplusplus
}
#endif
#endif /* FPTQ_CPU_ATTENTION_CPU_H */
