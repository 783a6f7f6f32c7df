#include "fptq_run/model.h"

#include <algorithm>
#include <array>
#include <limits>
#include <string_view>

#include "fptq_run/error.h"

namespace fptq_run {
namespace {

constexpr const char* kHint =
    "export a causal language model with a KV cache: fptq-export MODEL --engine FILE";
constexpr std::string_view kPast = "past_key_values.";
constexpr std::string_view kPresent = "present.";
constexpr std::size_t kCacheRank = 4;
constexpr std::array<const char*, 4> kIntegers{"input_ids", "attention_mask", "position_ids",
                                               "write_indices"};

const TensorInfo& Required(const Engine& engine, const std::string& name, std::size_t rank, bool is_input) {
  const TensorInfo* tensor = FindTensor(engine, name);
  if (tensor == nullptr || tensor->is_input != is_input) {
    throw Error("engine", std::string("has no ") + (is_input ? "input " : "output ") + name, kHint);
  }
  if (tensor->shape.size() != rank) {
    throw Error(name,
                "is " + TextOf(tensor->shape) + ", of " + std::to_string(tensor->shape.size()) +
                    " dimensions, not " + std::to_string(rank),
                kHint);
  }
  return *tensor;
}

std::int64_t LargestOf(const TensorInfo& input, std::size_t axis) {
  std::int64_t largest = 0;
  for (const Range& range : input.ranges) largest = std::max(largest, range.maximum[axis]);
  return largest;
}

bool IsInteger(DType type) { return type == DType::kInt32 || type == DType::kInt64; }

bool IsFloat(DType type) {
  return type == DType::kFloat16 || type == DType::kBFloat16 || type == DType::kFloat32;
}

void CheckInput(const TensorInfo& input) {
  if (input.name.starts_with(kPast)) {
    const bool codes = input.type == DType::kInt8 && !input.name.ends_with("_scale");
    if (!codes && !IsFloat(input.type)) {
      throw Error(input.name, "is " + NameOf(input.type) + ", which no cache is", kHint);
    }
    return;
  }
  if (std::find(kIntegers.begin(), kIntegers.end(), input.name) == kIntegers.end()) {
    throw Error(input.name, "is an input that nothing fills", "run single calls with fptq-run infer");
  }
  if (!IsInteger(input.type))
    throw Error(input.name, "is " + NameOf(input.type) + ", not int64 or int32", kHint);
}

CacheTensor CacheFrom(const Engine& engine, const TensorInfo& input) {
  const std::string present = std::string(kPresent) + input.name.substr(kPast.size());
  const TensorInfo& past = Required(engine, input.name, kCacheRank, true);
  const TensorInfo& output = Required(engine, present, kCacheRank, false);
  if (output.type != past.type) {
    throw Error(present, "is " + NameOf(output.type) + ", and goes back into " + NameOf(past.type), kHint);
  }
  if (past.shape[1] < 1 || past.shape[3] < 1)
    throw Error(past.name, "has heads of no fixed number or size", kHint);
  return {past.name, present, past.type, past.shape[1], past.shape[3]};
}

}  // namespace

const TensorInfo* FindTensor(const Engine& engine, const std::string& name) {
  const std::vector<TensorInfo>& tensors = engine.Tensors();
  const auto found = std::find_if(tensors.begin(), tensors.end(),
                                  [&](const TensorInfo& tensor) { return tensor.name == name; });
  return found == tensors.end() ? nullptr : &*found;
}

bool Fits(const Range& range, const Shape& shape) {
  if (shape.size() != range.maximum.size()) return false;
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    if (shape[axis] < range.minimum[axis] || shape[axis] > range.maximum[axis]) return false;
  }
  return true;
}

std::string PastOf(const std::string& name) {
  return name.starts_with(kPresent) ? std::string(kPast) + name.substr(kPresent.size()) : "";
}

Model Model::From(const Engine& engine) {
  Model model;
  const TensorInfo& ids = Required(engine, "input_ids", 2, true);
  const TensorInfo& logits = Required(engine, "logits", 3, false);
  if (!IsFloat(logits.type))
    throw Error("logits", "are " + NameOf(logits.type) + ", not of a float type", kHint);
  model.is_static = FindTensor(engine, "write_indices") != nullptr;
  model.max_batch = LargestOf(ids, 0);
  model.max_input = LargestOf(ids, 1);
  model.vocabulary = logits.shape[2];
  model.max_past = std::numeric_limits<std::int64_t>::max();
  for (const TensorInfo& tensor : engine.Tensors()) {
    if (!tensor.is_input) continue;
    CheckInput(tensor);
    if (!tensor.name.starts_with(kPast)) continue;
    model.cache.push_back(CacheFrom(engine, tensor));
    model.max_past = std::min(model.max_past, LargestOf(tensor, 2));
    model.slots = model.is_static ? tensor.shape[2] : 0;
  }
  if (model.cache.empty()) throw Error("engine", "has no KV cache", kHint);
  if (model.is_static && model.slots < 1)
    throw Error("engine", "has a static KV cache of no fixed length", kHint);
  if (model.is_static) model.max_past = model.slots - 1;
  return model;
}

}  // namespace fptq_run
