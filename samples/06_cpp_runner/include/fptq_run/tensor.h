// Element types, shapes, and tensors in the memory of the host.
#ifndef FPTQ_RUN_TENSOR_H
#define FPTQ_RUN_TENSOR_H

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fptq_run {

enum class DType : std::uint8_t { kBool, kInt8, kUInt8, kInt32, kInt64, kFloat16, kBFloat16, kFloat32 };

using Shape = std::vector<std::int64_t>;

std::size_t BytesOf(DType type);
// As NumPy calls it: "int64", "float16", ...
std::string NameOf(DType type);

// Number of elements; 1 for a scalar.
std::size_t VolumeOf(const Shape& shape);
// "1x9x0x64", "scalar".
std::string TextOf(const Shape& shape);

float FloatFromHalf(std::uint16_t bits);
float FloatFromBFloat16(std::uint16_t bits);

// `count` elements of a float type at `data` as FP32. Throws std::invalid_argument for another type.
std::vector<float> FloatsFrom(const std::byte* data, DType type, std::size_t count);

// A tensor in C order.
struct HostTensor {
  DType type = DType::kFloat32;
  Shape shape;
  std::vector<std::byte> data;  // VolumeOf(shape) * BytesOf(type)

  static HostTensor Zeros(DType type, Shape shape);
  // INT32 or INT64 values. Throws std::out_of_range where one does not fit.
  static HostTensor FromIntegers(DType type, Shape shape, const std::vector<std::int64_t>& values);
  // Throws std::invalid_argument where the type is no integer of 32 or 64 bits.
  [[nodiscard]] std::vector<std::int64_t> Integers() const;
};

}  // namespace fptq_run

#endif  // FPTQ_RUN_TENSOR_H
