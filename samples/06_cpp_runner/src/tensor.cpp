#include "fptq_run/tensor.h"

#include <bit>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace fptq_run {
namespace {

struct TypeFacts {
  std::size_t bytes;
  const char* name;
};

TypeFacts FactsOf(DType type) {
  switch (type) {
    case DType::kBool:
      return {1, "bool"};
    case DType::kInt8:
      return {1, "int8"};
    case DType::kUInt8:
      return {1, "uint8"};
    case DType::kInt32:
      return {4, "int32"};
    case DType::kInt64:
      return {8, "int64"};
    case DType::kFloat16:
      return {2, "float16"};
    case DType::kBFloat16:
      return {2, "bfloat16"};
    case DType::kFloat32:
      return {4, "float32"};
  }
  throw std::invalid_argument("unknown element type");
}

}  // namespace

std::size_t BytesOf(DType type) { return FactsOf(type).bytes; }

std::string NameOf(DType type) { return FactsOf(type).name; }

std::size_t VolumeOf(const Shape& shape) {
  std::size_t volume = 1;
  for (const std::int64_t size : shape) volume *= static_cast<std::size_t>(size);
  return volume;
}

std::string TextOf(const Shape& shape) {
  if (shape.empty()) return "scalar";
  std::string text;
  for (const std::int64_t size : shape) {
    if (!text.empty()) text += 'x';
    text += std::to_string(size);
  }
  return text;
}

float FloatFromHalf(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000U) << 16U;
  const std::uint32_t exponent = (bits >> 10U) & 0x1FU;
  const std::uint32_t fraction = bits & 0x3FFU;
  if (exponent == 0) {  // zero and subnormal numbers: fraction x 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24F;
    return sign != 0 ? -magnitude : magnitude;
  }
  // The bias is 15 here and 127 there; infinities and NaN keep an exponent of all ones.
  const std::uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | (wide << 23U) | (fraction << 13U));
}

float FloatFromBFloat16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16U);
}

std::vector<float> FloatsFrom(const std::byte* data, DType type, std::size_t count) {
  std::vector<float> floats(count);
  if (type == DType::kFloat32) {
    if (count != 0) std::memcpy(floats.data(), data, count * sizeof(float));
    return floats;
  }
  if (type != DType::kFloat16 && type != DType::kBFloat16) {
    throw std::invalid_argument(NameOf(type) + " is no float type");
  }
  const bool half = type == DType::kFloat16;
  for (std::size_t index = 0; index < count; ++index) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, data + (index * sizeof(bits)), sizeof(bits));
    floats[index] = half ? FloatFromHalf(bits) : FloatFromBFloat16(bits);
  }
  return floats;
}

HostTensor HostTensor::Zeros(DType type, Shape shape) {
  const std::size_t bytes = VolumeOf(shape) * BytesOf(type);
  return {type, std::move(shape), std::vector<std::byte>(bytes)};
}

HostTensor HostTensor::FromIntegers(DType type, Shape shape, const std::vector<std::int64_t>& values) {
  HostTensor tensor = Zeros(type, std::move(shape));
  if (values.size() * BytesOf(type) != tensor.data.size()) {
    throw std::invalid_argument("as many values as the shape has");
  }
  for (std::size_t index = 0; index < values.size(); ++index) {
    std::byte* to = tensor.data.data() + (index * BytesOf(type));
    if (type == DType::kInt64) {
      std::memcpy(to, &values[index], sizeof(std::int64_t));
      continue;
    }
    if (values[index] < std::numeric_limits<std::int32_t>::min() ||
        values[index] > std::numeric_limits<std::int32_t>::max()) {
      throw std::out_of_range("does not fit INT32");
    }
    const auto value = static_cast<std::int32_t>(values[index]);
    std::memcpy(to, &value, sizeof(value));
  }
  return tensor;
}

std::vector<std::int64_t> HostTensor::Integers() const {
  if (type != DType::kInt32 && type != DType::kInt64) {
    throw std::invalid_argument("is " + NameOf(type) + ", not int64 or int32");
  }
  std::vector<std::int64_t> values(VolumeOf(shape));
  for (std::size_t index = 0; index < values.size(); ++index) {
    if (type == DType::kInt64) {
      std::memcpy(&values[index], data.data() + (index * sizeof(std::int64_t)), sizeof(std::int64_t));
    } else {
      std::int32_t value = 0;
      std::memcpy(&value, data.data() + (index * sizeof(value)), sizeof(value));
      values[index] = value;
    }
  }
  return values;
}

}  // namespace fptq_run
