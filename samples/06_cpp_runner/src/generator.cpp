#include "fptq_run/generator.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <utility>

#include "fptq_run/error.h"

namespace fptq_run {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

TokenIds Repeated(std::int64_t value, std::int64_t count) {
  return TokenIds(static_cast<std::size_t>(count), value);
}

}  // namespace

// A prompt on its way.
struct Generator::Sequence {
  std::size_t number;  // among the prompts
  const TokenIds* prompt;
  Sampler sampler;
  Completion completion;
  bool is_done = false;

  void Take(const std::vector<float>& logits, const Request& request) {
    if (is_done) return;
    const std::int64_t id = sampler.Next(logits);
    completion.ids.push_back(id);
    const bool stops = std::find(request.stop.begin(), request.stop.end(), id) != request.stop.end();
    completion.finish = stops ? Finish::kStop : Finish::kLength;
    is_done = stops || std::cmp_equal(completion.ids.size(), request.max_tokens);
  }
};

Generator::Generator(Device& device, Engine& engine)
    : device_(device), engine_(engine), model_(Model::From(engine)) {
  for (int profile = 0; profile < engine.ProfileCount(); ++profile) {
    contexts_.push_back(engine.CreateContext(profile));
  }
  AllocateBuffers();
}

void Generator::AllocateBuffers() {
  std::map<std::string, std::size_t> bytes;
  for (std::size_t profile = 0; profile < contexts_.size(); ++profile) {
    for (const TensorInfo& tensor : engine_.Tensors()) {
      if (!tensor.is_input) continue;
      const Shape& largest = tensor.ranges[profile].maximum;
      contexts_[profile]->SetInputShape(tensor.name, largest);
      bytes[tensor.name] = std::max(bytes[tensor.name], VolumeOf(largest) * BytesOf(tensor.type));
    }
    for (const TensorInfo& tensor : engine_.Tensors()) {
      if (tensor.is_input) continue;
      const Shape largest = contexts_[profile]->OutputShape(tensor.name);
      bytes[tensor.name] = std::max(bytes[tensor.name], VolumeOf(largest) * BytesOf(tensor.type));
    }
  }
  for (const CacheTensor& tensor : model_.cache) {
    // Past and present change places, so both have room for the longer.
    const std::size_t size = std::max(bytes[tensor.past], bytes[tensor.present]);
    past_.emplace_back(device_, size);
    // A hidden slot enters attention as 0 x value: it must not be NaN.
    device_.Zero(past_.back().address(), size);
    if (!model_.is_static) present_.emplace_back(device_, size);
    bytes.erase(tensor.past);
    bytes.erase(tensor.present);
  }
  for (const auto& [name, size] : bytes) buffers_.emplace(name, DeviceBuffer(device_, size));
}

void Generator::CheckRequest(const std::vector<TokenIds>& prompts, const Request& request) const {
  CheckSampling(request.sampling);
  if (request.max_tokens < 1) throw Error("--max-tokens", "is below 1");
  if (request.cuda_graph && !model_.is_static) {
    throw Error("--cuda-graph", "this engine's KV cache grows, so no two steps are the same work",
                "build it with --kv-cache static");
  }
  const std::int64_t longest = model_.is_static ? std::min(model_.max_input, model_.slots) : model_.max_input;
  for (std::size_t number = 0; number < prompts.size(); ++number) {
    const TokenIds& prompt = prompts[number];
    const std::string where = "prompt " + std::to_string(number);
    if (prompt.empty()) throw Error(where, "is empty", "give it a token, e.g. the model's first one");
    if (std::cmp_greater(prompt.size(), longest)) {
      throw Error(where,
                  "has " + std::to_string(prompt.size()) + " tokens, and the engine takes at most " +
                      std::to_string(longest),
                  "shorten it, or build the engine with a larger --max-input-len");
    }
    for (const std::int64_t id : prompt) {
      if (id >= 0 && id < model_.vocabulary) continue;
      throw Error(
          where,
          "token " + std::to_string(id) + " is not in the vocabulary of " + std::to_string(model_.vocabulary),
          "use the tokenizer of this model");
    }
  }
}

std::vector<Completion> Generator::Generate(const std::vector<TokenIds>& prompts, const Request& request) {
  CheckRequest(prompts, request);
  std::map<std::size_t, std::vector<Sequence>> by_length;
  for (std::size_t number = 0; number < prompts.size(); ++number) {
    const TokenIds& prompt = prompts[number];
    by_length[prompt.size()].push_back(
        {number, &prompt, Sampler(request.sampling, number), Completion{}, false});
  }
  std::vector<Completion> completions(prompts.size());
  for (auto& [length, sequences] : by_length) {
    while (!sequences.empty()) {
      const auto count = std::min(static_cast<std::ptrdiff_t>(sequences.size()),
                                  static_cast<std::ptrdiff_t>(model_.max_batch));
      std::vector<Sequence> batch(sequences.begin(), sequences.begin() + count);
      sequences.erase(sequences.begin(), sequences.begin() + count);
      RunBatch(batch, request);
      for (Sequence& sequence : batch) completions[sequence.number] = std::move(sequence.completion);
    }
  }
  return completions;
}

void Generator::RunBatch(std::vector<Sequence>& batch, const Request& request) {
  const Call prompt{static_cast<std::int64_t>(batch.size()),
                    static_cast<std::int64_t>(batch.front().prompt->size()), 0};
  TokenIds ids;
  for (const Sequence& sequence : batch)
    ids.insert(ids.end(), sequence.prompt->begin(), sequence.prompt->end());
  Clock::time_point start = Clock::now();
  const std::vector<std::vector<float>> logits = Prefill(ids, prompt);
  for (std::size_t row = 0; row < batch.size(); ++row) batch[row].Take(logits[row], request);
  timings_.prefill_seconds += SecondsSince(start);
  timings_.prompt_tokens += prompt.batch * prompt.tokens;
  start = Clock::now();
  Decode(batch, {prompt.batch, 1, prompt.tokens}, request);
  timings_.decode_seconds += SecondsSince(start);
}

std::vector<std::vector<float>> Generator::Prefill(const TokenIds& ids, const Call& call) {
  Context& context = Prepare(call);
  WriteInputs(ids, call);
  context.Enqueue();
  if (!model_.is_static) std::swap(past_, present_);
  return ReadLogits(context);
}

void Generator::Decode(std::vector<Sequence>& batch, Call call, const Request& request) {
  const auto is_done = [](const Sequence& sequence) { return sequence.is_done; };
  Context* context = nullptr;
  std::unique_ptr<Graph> graph;
  for (bool is_first = true; !std::all_of(batch.begin(), batch.end(), is_done);
       is_first = false, ++call.past) {
    if (call.past > model_.max_past) {
      for (Sequence& sequence : batch) {
        if (!sequence.is_done) sequence.completion.finish = Finish::kCache;
      }
      return;
    }
    TokenIds ids;
    for (const Sequence& sequence : batch) ids.push_back(sequence.completion.ids.back());
    // Steps on a static cache differ in what the inputs hold, not in shapes or addresses.
    if (is_first || !model_.is_static) context = &Prepare(call);
    WriteInputs(ids, call);
    // The first step is not captured: TensorRT does what new shapes need in the call after they are set.
    if (request.cuda_graph && !is_first && graph == nullptr) {
      graph = device_.Capture([&] { context->Enqueue(); });
    }
    if (graph != nullptr) {
      graph->Launch();
    } else {
      context->Enqueue();
    }
    if (!model_.is_static) std::swap(past_, present_);
    const std::vector<std::vector<float>> logits = ReadLogits(*context);
    timings_.decode_tokens += std::count_if(batch.begin(), batch.end(), std::not_fn(is_done));
    for (std::size_t row = 0; row < batch.size(); ++row) batch[row].Take(logits[row], request);
  }
}

Shape Generator::InputShape(const TensorInfo& input, const Call& call) const {
  if (input.name == "write_indices") return {call.batch};
  if (input.name == "attention_mask") {
    return {call.batch, model_.is_static ? model_.slots : call.past + call.tokens};
  }
  if (input.shape.size() == 2) return {call.batch, call.tokens};
  return {call.batch, input.shape[1], model_.is_static ? model_.slots : call.past, input.shape[3]};
}

std::size_t Generator::ProfileFor(const Call& call) const {
  for (std::size_t profile = 0; profile < contexts_.size(); ++profile) {
    const std::vector<TensorInfo>& tensors = engine_.Tensors();
    if (std::all_of(tensors.begin(), tensors.end(), [&](const TensorInfo& tensor) {
          return !tensor.is_input || Fits(tensor.ranges[profile], InputShape(tensor, call));
        })) {
      return profile;
    }
  }
  throw Error("engine",
              "no profile allows " + std::to_string(call.batch) + " x " + std::to_string(call.tokens) +
                  " tokens behind " + std::to_string(call.past),
              "build it with profiles for a prompt and for one token behind it");
}

Context& Generator::Prepare(const Call& call) {
  Context& context = *contexts_[ProfileFor(call)];
  for (const TensorInfo& tensor : engine_.Tensors()) {
    if (tensor.is_input) context.SetInputShape(tensor.name, InputShape(tensor, call));
  }
  for (const auto& [name, buffer] : buffers_) context.SetAddress(name, buffer.address());
  for (std::size_t index = 0; index < model_.cache.size(); ++index) {
    context.SetAddress(model_.cache[index].past, past_[index].address());
    context.SetAddress(model_.cache[index].present, (model_.is_static ? past_ : present_)[index].address());
  }
  return context;
}

void Generator::WriteInputs(const TokenIds& ids, const Call& call) {
  for (const auto& [name, buffer] : buffers_) {
    const TensorInfo& tensor = *FindTensor(engine_, name);
    if (!tensor.is_input) continue;
    const Shape shape = InputShape(tensor, call);
    TokenIds values = ids;
    if (name == "attention_mask") values = Repeated(1, static_cast<std::int64_t>(VolumeOf(shape)));
    if (name == "write_indices") values = Repeated(call.past, call.batch);
    if (name == "position_ids") {
      for (std::size_t index = 0; index < values.size(); ++index) {
        values[index] = call.past + (static_cast<std::int64_t>(index) % call.tokens);
      }
    }
    staged_.push_back(HostTensor::FromIntegers(tensor.type, shape, values));
    device_.CopyToDevice(buffer.address(), staged_.back().data.data(), staged_.back().data.size());
  }
}

std::vector<std::vector<float>> Generator::ReadLogits(const Context& context) {
  const TensorInfo& tensor = *FindTensor(engine_, "logits");
  const Shape shape = context.OutputShape(tensor.name);  // [B, S or 1, V]
  const auto rows = static_cast<std::size_t>(shape[1]);
  const auto count = static_cast<std::size_t>(shape[2]);
  const std::size_t row_bytes = count * BytesOf(tensor.type);
  std::vector<std::vector<std::byte>> last(static_cast<std::size_t>(shape[0]),
                                           std::vector<std::byte>(row_bytes));
  auto* address = static_cast<std::byte*>(buffers_.at(tensor.name).address());
  for (std::size_t sequence = 0; sequence < last.size(); ++sequence) {
    const std::size_t row = (sequence * rows) + rows - 1;
    device_.CopyToHost(last[sequence].data(), address + (row * row_bytes), row_bytes);
  }
  device_.Synchronize();
  staged_.clear();
  std::vector<std::vector<float>> logits;
  logits.reserve(last.size());
  for (const std::vector<std::byte>& row : last) logits.push_back(FloatsFrom(row.data(), tensor.type, count));
  return logits;
}

}  // namespace fptq_run
