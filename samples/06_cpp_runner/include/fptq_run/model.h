// What inputs and outputs of an engine mean: a causal language model with a KV cache.
//
//   input_ids [B, S], attention_mask [B, past + S] or [B, slots], position_ids [B, S], write_indices [B],
//   past_key_values.N.key / .value [B, H, past or slots, D], with INT8 codes also *_scale [B, H, ..., 1]
//   -> logits [B, S or 1, V], present.N.key / .value and their scales
//
// With `write_indices` the cache is static: `slots` long, and written in place.
#ifndef FPTQ_RUN_MODEL_H
#define FPTQ_RUN_MODEL_H

#include <string>
#include <vector>

#include "fptq_run/engine.h"

namespace fptq_run {

// One tensor of the cache: the input, and the output that goes back into it.
struct CacheTensor {
  std::string past;
  std::string present;
  DType type;
  std::int64_t heads;
  std::int64_t width;  // head size, or 1 for scales
};

// The input that an output `present.*` goes back into; empty for another output.
std::string PastOf(const std::string& name);

struct Model {
  bool is_static = false;
  std::vector<CacheTensor> cache;
  std::int64_t slots = 0;  // of a static cache
  std::int64_t max_batch = 0;
  std::int64_t max_input = 0;  // tokens of a prompt
  std::int64_t max_past = 0;   // tokens in the cache before a call
  std::int64_t vocabulary = 0;

  // Reads it off the engine. Throws Error where something is missing or is of a type that is not known.
  static Model From(const Engine& engine);
};

}  // namespace fptq_run

#endif  // FPTQ_RUN_MODEL_H
