// A tiny language model in integers, and what a plan of it says.
//
// Token t at position p has, in layer l, kind c (0 key, 1 value), head h, column d, the integer
//   x = (7 t + 3 p + 5 l + 11 c + 2 h + d) mod 13 - 6,
// stored as it is, or as INT8 code x / scale with scale = 1 for odd t and 0.5 for even t. Of a query at slot q,
//   sum = (s + 1) ((l + 1) key + (h + 1) value), over all l, h, d and slots s <= q that the mask does not hide,
//   logit v = ((sum (v + 3) + 5 position + v v) mod 101) / 8.
// It reads keys and values from the cache, so a wrong buffer, shape, index or mask gives other tokens.
#ifndef FPTQ_RUN_TESTS_TINY_MODEL_H
#define FPTQ_RUN_TESTS_TINY_MODEL_H

#include <cstdint>
#include <istream>
#include <map>
#include <string>

#include "fptq_run/device.h"
#include "fptq_run/tensor.h"

namespace fptq_run {

// Pairs of words: a name and its value.
class Settings {
 public:
  Settings() = default;
  explicit Settings(std::istream& words) {
    for (std::string name, value; words >> name >> value;) values_[name] = value;
  }
  [[nodiscard]] std::string Text(const std::string& name, const std::string& otherwise) const {
    const auto found = values_.find(name);
    return found == values_.end() ? otherwise : found->second;
  }
  [[nodiscard]] std::int64_t Number(const std::string& name, std::int64_t otherwise) const {
    return std::stoll(Text(name, std::to_string(otherwise)));
  }

 private:
  std::map<std::string, std::string> values_;
};

// What a plan of the double says.
struct Spec {
  bool is_static, int8;
  std::int64_t layers, heads, width, vocabulary;
  std::int64_t batch, input, past;  // largest of each
  std::string ids, type, logits;    // "int64", "float16", "all" or "last"
  bool two_profiles;                // one for prompts, one for one token behind them
  bool carries_plugin;              // it loads only where its own code may run

  explicit Spec(const Settings& settings)
      : is_static(settings.Number("static", 0) != 0),
        int8(settings.Number("int8", 0) != 0),
        layers(settings.Number("layers", 2)),
        heads(settings.Number("heads", 2)),
        width(settings.Number("head_size", 4)),
        vocabulary(settings.Number("vocabulary", 37)),
        batch(settings.Number("batch", 2)),
        input(settings.Number("input", 8)),
        past(settings.Number("past", 12)),
        ids(settings.Text("ids", "int64")),
        type(settings.Text("type", "float16")),
        logits(settings.Text("logits", "all")),
        two_profiles(settings.Number("two_profiles", 0) != 0),
        carries_plugin(settings.Number("carries_plugin", 0) != 0) {}

  [[nodiscard]] std::int64_t slots() const { return past + input; }
};

DType TypeNamed(const std::string& name);

// "0.key": part of the names of a cache's tensors; kind 0 is the key, 1 the value.
std::string CacheName(std::int64_t layer, int kind);

// One call, with shapes of its inputs, and addresses of its inputs and outputs in the memory of the host.
void RunTinyModel(const Spec& spec, const std::map<std::string, Shape>& shapes,
                  const std::map<std::string, Address>& addresses);

}  // namespace fptq_run

#endif  // FPTQ_RUN_TESTS_TINY_MODEL_H
