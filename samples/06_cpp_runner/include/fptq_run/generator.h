// Tokens in, tokens out: prefill and decode with the KV cache.
#ifndef FPTQ_RUN_GENERATOR_H
#define FPTQ_RUN_GENERATOR_H

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fptq_run/device.h"
#include "fptq_run/engine.h"
#include "fptq_run/model.h"
#include "fptq_run/sampling.h"

namespace fptq_run {

using TokenIds = std::vector<std::int64_t>;

enum class Finish : std::uint8_t {
  kStop,    // a stop token came; it is the last of the ids
  kLength,  // as many tokens as were asked for
  kCache,   // the KV cache is full
};

struct Completion {
  TokenIds ids;
  Finish finish = Finish::kLength;
};

struct Timings {
  double prefill_seconds = 0.0;
  double decode_seconds = 0.0;
  std::int64_t prompt_tokens = 0;
  std::int64_t decode_tokens = 0;
};

struct Request {
  std::int64_t max_tokens = 128;
  Sampling sampling;
  TokenIds stop;
  bool cuda_graph = false;  // static cache only: decode steps after the first are one launch
};

// Prompts of one length run as one batch, as large as the profiles allow, so that no token is padding and each
// sequence is computed as if it were alone. Memory is allocated once, for the largest shapes of the profiles.
class Generator {
 public:
  // Device and engine must outlive it. Throws Error where the engine is no causal language model.
  Generator(Device& device, Engine& engine);

  // One completion for each prompt, in their order. Throws Error.
  std::vector<Completion> Generate(const std::vector<TokenIds>& prompts, const Request& request);

  [[nodiscard]] const Model& model() const { return model_; }
  // Of all calls of Generate.
  [[nodiscard]] const Timings& timings() const { return timings_; }

 private:
  // Shapes of one call: `tokens` new ones for each sequence, behind `past`.
  struct Call {
    std::int64_t batch;
    std::int64_t tokens;
    std::int64_t past;
  };
  struct Sequence;

  void CheckRequest(const std::vector<TokenIds>& prompts, const Request& request) const;
  void AllocateBuffers();
  void RunBatch(std::vector<Sequence>& batch, const Request& request);

  [[nodiscard]] Shape InputShape(const TensorInfo& input, const Call& call) const;
  // Index of the first profile that allows a call; throws Error where none does.
  [[nodiscard]] std::size_t ProfileFor(const Call& call) const;
  // Sets shapes and addresses of a call.
  Context& Prepare(const Call& call);
  void WriteInputs(const TokenIds& ids, const Call& call);
  // Logits of the last token of each sequence.
  std::vector<std::vector<float>> ReadLogits(const Context& context);
  std::vector<std::vector<float>> Prefill(const TokenIds& ids, const Call& call);
  void Decode(std::vector<Sequence>& batch, Call call, const Request& request);

  Device& device_;
  Engine& engine_;
  Model model_;
  std::vector<std::unique_ptr<Context>> contexts_;  // by profile
  std::map<std::string, DeviceBuffer> buffers_;     // inputs beside the cache, and outputs beside it
  std::vector<DeviceBuffer> past_;                  // of each cache tensor
  std::vector<DeviceBuffer> present_;  // the other half of the ping-pong; none for a static cache
  std::vector<HostTensor> staged_;     // what copies read until the next synchronization
  Timings timings_;
};

}  // namespace fptq_run

#endif  // FPTQ_RUN_GENERATOR_H
