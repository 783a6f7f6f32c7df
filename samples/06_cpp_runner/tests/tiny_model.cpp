#include "tiny_model.h"

#include <cmath>
#include <cstring>

#include "fptq_run/error.h"

namespace fptq_run {
namespace {

// Small integers and multiples of 1/8, which every float type holds.
void Store(std::byte* to, DType type, double value) {
  const auto wide = static_cast<float>(value);
  std::uint32_t bits = 0;
  std::memcpy(&bits, &wide, sizeof(bits));
  if (type == DType::kInt8) {
    const auto code = static_cast<std::int8_t>(value);
    std::memcpy(to, &code, 1);
  } else if (type == DType::kFloat32) {
    std::memcpy(to, &wide, sizeof(wide));
  } else if (type == DType::kBFloat16) {
    const auto half = static_cast<std::uint16_t>(bits >> 16U);
    std::memcpy(to, &half, sizeof(half));
  } else {
    const std::uint32_t exponent = (bits >> 23U) & 0xFFU;
    const auto half = static_cast<std::uint16_t>(
        wide == 0.0F ? 0U
                     : ((bits >> 16U) & 0x8000U) | ((exponent - 112U) << 10U) | ((bits >> 13U) & 0x3FFU));
    std::memcpy(to, &half, sizeof(half));
  }
}

double Read(const std::byte* from, DType type) {
  if (type == DType::kInt8) return static_cast<std::int8_t>(*from);
  return FloatsFrom(from, type, 1).front();
}

struct Call {
  const Spec* spec;
  const std::map<std::string, Shape>& shapes;
  const std::map<std::string, Address>& addresses;

  [[nodiscard]] std::int64_t Integer(const std::string& name, std::int64_t index) const {
    const DType type = TypeNamed(spec->ids);
    const HostTensor one{type, {1}, {At(name, index, BytesOf(type)), At(name, index + 1, BytesOf(type))}};
    return one.Integers().front();
  }
  [[nodiscard]] std::byte* At(const std::string& name, std::int64_t index, std::size_t bytes) const {
    return static_cast<std::byte*>(addresses.at(name)) + (static_cast<std::size_t>(index) * bytes);
  }
  [[nodiscard]] std::int64_t batch() const { return shapes.at("input_ids")[0]; }
  [[nodiscard]] std::int64_t tokens() const { return shapes.at("input_ids")[1]; }
  [[nodiscard]] std::int64_t past() const { return shapes.at("past_key_values.0.key")[2]; }
  [[nodiscard]] std::int64_t slots() const { return spec->is_static ? past() : past() + tokens(); }
  [[nodiscard]] std::int64_t Filled(std::int64_t row) const {
    return spec->is_static ? Integer("write_indices", row) : past();
  }
  [[nodiscard]] DType type() const { return TypeNamed(spec->int8 ? "int8" : spec->type); }

  void Run() const {
    for (std::int64_t layer = 0; layer < spec->layers; ++layer) {
      for (const int kind : {0, 1}) Extend(layer, kind);
    }
    for (std::int64_t row = 0; row < batch(); ++row) {
      for (std::int64_t query = 0; query < tokens(); ++query) WriteLogits(row, query);
    }
  }

  // The old tokens of a growing cache, then the new ones; a static one is written in place.
  void Extend(std::int64_t layer, int kind) const {
    const std::string name = CacheName(layer, kind);
    const std::string past_name = "past_key_values." + name;
    for (const char* suffix : {"", "_scale"}) {
      if (*suffix != 0 && !spec->int8) continue;
      const std::size_t bytes = *suffix != 0 ? 4 : static_cast<std::size_t>(spec->width) * BytesOf(type());
      for (std::int64_t row = 0; row < batch() * spec->heads && !spec->is_static; ++row) {
        std::memcpy(At("present." + name + suffix, row * slots(), bytes),
                    At(past_name + suffix, row * past(), bytes), static_cast<std::size_t>(past()) * bytes);
      }
    }
    for (std::int64_t row = 0; row < batch(); ++row) {
      for (std::int64_t token = 0; token < tokens(); ++token) WriteToken(row, token, layer, kind);
    }
  }

  void WriteToken(std::int64_t row, std::int64_t token, std::int64_t layer, int kind) const {
    const std::int64_t id = Integer("input_ids", (row * tokens()) + token);
    const std::int64_t position = Integer("position_ids", (row * tokens()) + token);
    const double scale = id % 2 == 0 ? 0.5 : 1.0;
    for (std::int64_t head = 0; head < spec->heads; ++head) {
      const std::int64_t slot = (((row * spec->heads) + head) * slots()) + Filled(row) + token;
      const std::string name = "present." + CacheName(layer, kind);
      if (spec->int8) Store(At(name + "_scale", slot, 4), DType::kFloat32, scale);
      for (std::int64_t column = 0; column < spec->width; ++column) {
        const auto x = static_cast<double>(
            (((7 * id) + (3 * position) + (5 * layer) + (11 * kind) + (2 * head) + column) % 13) - 6);
        Store(At(name, (slot * spec->width) + column, BytesOf(type())), type(), spec->int8 ? x / scale : x);
      }
    }
  }

  [[nodiscard]] double Value(std::int64_t row, std::int64_t slot, std::int64_t layer, int kind,
                             std::int64_t head, std::int64_t column) const {
    const std::int64_t at = (((row * spec->heads) + head) * slots()) + slot;
    const std::string name = "present." + CacheName(layer, kind);
    const double scale = spec->int8 ? Read(At(name + "_scale", at, 4), DType::kFloat32) : 1.0;
    return Read(At(name, (at * spec->width) + column, BytesOf(type())), type()) * scale;
  }

  void WriteLogits(std::int64_t row, std::int64_t query) const {
    double sum = 0.0;
    for (std::int64_t slot = 0; slot < slots(); ++slot) {
      const bool seen = slot <= Filled(row) + query && Integer("attention_mask", (row * slots()) + slot) != 0;
      const double weight = seen ? static_cast<double>(slot + 1) : 0.0;  // 0 x NaN is NaN
      for (std::int64_t layer = 0; layer < spec->layers; ++layer) {
        for (std::int64_t head = 0; head < spec->heads; ++head) {
          for (std::int64_t column = 0; column < spec->width; ++column) {
            sum += weight * ((static_cast<double>(layer + 1) * Value(row, slot, layer, 0, head, column)) +
                             (static_cast<double>(head + 1) * Value(row, slot, layer, 1, head, column)));
          }
        }
      }
    }
    const bool last_only = spec->logits == "last";
    if (last_only && query + 1 != tokens()) return;
    const std::int64_t at = (last_only ? row : (row * tokens()) + query) * spec->vocabulary;
    const auto position = static_cast<double>(Integer("position_ids", (row * tokens()) + query));
    const DType logits = TypeNamed(spec->type);
    for (std::int64_t v = 0; v < spec->vocabulary; ++v) {
      const auto id = static_cast<double>(v);
      const double rest = std::fmod((sum * (id + 3.0)) + (5.0 * position) + (id * id), 101.0);
      const double logit = (rest < 0.0 ? rest + 101.0 : rest) / 8.0;
      if (std::isnan(logit)) {
        std::memset(At("logits", at + v, BytesOf(logits)), 0xFF, BytesOf(logits));
      } else {
        Store(At("logits", at + v, BytesOf(logits)), logits, logit);
      }
    }
  }
};

}  // namespace

DType TypeNamed(const std::string& name) {
  for (const DType type :
       {DType::kInt8, DType::kInt32, DType::kInt64, DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    if (NameOf(type) == name) return type;
  }
  throw Error(name, "is no element type of the double");
}

std::string CacheName(std::int64_t layer, int kind) {
  return std::to_string(layer) + (kind == 0 ? ".key" : ".value");
}

void RunTinyModel(const Spec& spec, const std::map<std::string, Shape>& shapes,
                  const std::map<std::string, Address>& addresses) {
  Call{&spec, shapes, addresses}.Run();
}

}  // namespace fptq_run
