// NumPy's .npy format (numpy/lib/_format_impl.py describes it) and base64 (RFC 4648).
#include <algorithm>
#include <array>
#include <cstring>
#include <string_view>
#include <utility>

#include "fptq_run/error.h"
#include "fptq_run/polygraphy_files.h"

namespace fptq_run {
namespace {

constexpr std::string_view kMagic("\x93NUMPY", 6);
constexpr std::size_t kAlignment = 64;
constexpr std::int64_t kMostElements = 1'000'000'000'000;
// NumPy leaves room for a growing first axis.
constexpr std::size_t kGrowthDigits = 21;

struct Descr {
  DType type;
  std::string_view text;
};
constexpr std::array<Descr, 7> kDescrs{{{DType::kBool, "|b1"},
                                        {DType::kInt8, "|i1"},
                                        {DType::kUInt8, "|u1"},
                                        {DType::kInt32, "<i4"},
                                        {DType::kInt64, "<i8"},
                                        {DType::kFloat16, "<f2"},
                                        {DType::kFloat32, "<f4"}}};

std::string ShapeText(const Shape& shape) {
  std::string text = "(";
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    text += (axis == 0 ? "" : ", ") + std::to_string(shape[axis]);
  }
  return text + (shape.size() == 1 ? ",)" : ")");
}

// What follows `key` in the header, up to `end`.
std::string_view Field(std::string_view header, std::string_view key, char end, const std::string& where) {
  const std::size_t at = header.find(key);
  const std::size_t stop = at == std::string_view::npos ? at : header.find(end, at + key.size());
  if (stop == std::string_view::npos) throw Error(where, "is no .npy file: its header is damaged");
  return header.substr(at + key.size(), stop - at - key.size());
}

Shape ShapeFromText(std::string_view text, const std::string& where) {
  Shape shape;
  std::int64_t size = -1;
  for (const char letter : std::string(text) + ",") {
    if (letter >= '0' && letter <= '9') {
      size = (std::max<std::int64_t>(size, 0) * 10) + (letter - '0');
      if (size > kMostElements) throw Error(where, "has a dimension that no memory holds");
    } else if (letter == ',') {
      if (size >= 0) shape.push_back(size);
      size = -1;
    } else if (letter != ' ') {
      throw Error(where, "is no .npy file: its shape is damaged");
    }
  }
  return shape;
}

// Elements of a tensor whose first axis runs fastest, in C order.
std::vector<std::byte> InCOrder(const HostTensor& tensor) {
  const std::size_t bytes = BytesOf(tensor.type);
  const std::size_t rank = tensor.shape.size();
  std::vector<std::byte> ordered(tensor.data.size());
  std::vector<std::size_t> index(rank);
  for (std::size_t to = 0; to * bytes < ordered.size(); ++to) {
    std::size_t from = 0;
    for (std::size_t axis = rank; axis-- > 0;) from = (from * tensor.shape[axis]) + index[axis];
    std::memcpy(ordered.data() + (to * bytes), tensor.data.data() + (from * bytes), bytes);
    for (std::size_t axis = rank; axis-- > 0;) {
      if (std::cmp_less(++index[axis], tensor.shape[axis])) break;
      index[axis] = 0;
    }
  }
  return ordered;
}

// Whether elements of `size` bytes in a shape are so many bytes; no product overflows.
bool HasBytes(const Shape& shape, std::size_t size, std::size_t bytes) {
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return bytes == 0;
  for (const std::int64_t length : shape) {
    if (std::cmp_greater(length, bytes / size)) return false;
    size *= static_cast<std::size_t>(length);
  }
  return size == bytes;
}

DType TypeFromDescr(std::string_view descr, const std::string& where) {
  for (const Descr& known : kDescrs) {
    if (known.text == descr) return known.type;
  }
  throw Error(where, "is an array of NumPy type " + std::string(descr) + ", which no engine takes",
              "use bool, int8, uint8, int32, int64, float16 or float32");
}

struct Header {
  std::string_view text;
  std::size_t data_at;
};

Header HeaderOf(std::string_view npy, const std::string& where) {
  const std::size_t major = npy.size() > kMagic.size() ? static_cast<unsigned char>(npy[kMagic.size()]) : 0;
  const std::size_t width = major == 1 ? 2 : 4;
  const std::size_t start = kMagic.size() + 2 + width;
  if (!npy.starts_with(kMagic) || major < 1 || major > 3 || npy.size() < start) {
    throw Error(where, "is no .npy file", "write it with polygraphy or numpy.save");
  }
  std::size_t length = 0;
  for (std::size_t byte = width; byte-- > 0;) {
    length = (length << 8U) | static_cast<unsigned char>(npy[kMagic.size() + 2 + byte]);
  }
  if (npy.size() - start < length) throw Error(where, "is no .npy file: its header is cut off");
  return {npy.substr(start, length), start + length};
}

}  // namespace

std::string NpyFromTensor(const HostTensor& tensor) {
  std::string_view descr;
  for (const Descr& known : kDescrs) {
    if (known.type == tensor.type) descr = known.text;
  }
  if (descr.empty()) throw Error("array", "NumPy has no " + NameOf(tensor.type));
  std::string header = "{'descr': '" + std::string(descr) +
                       "', 'fortran_order': False, 'shape': " + ShapeText(tensor.shape) + ", }";
  if (!tensor.shape.empty()) header.append(kGrowthDigits - std::to_string(tensor.shape.front()).size(), ' ');
  const std::size_t before = kMagic.size() + 4;
  header.append(kAlignment - ((before + header.size() + 1) % kAlignment), ' ');
  header += '\n';
  std::string npy(kMagic);
  npy += {'\x01', '\x00', static_cast<char>(header.size() & 0xFFU), static_cast<char>(header.size() >> 8U)};
  npy += header;
  npy.append(reinterpret_cast<const char*>(tensor.data.data()), tensor.data.size());
  return npy;
}

HostTensor TensorFromNpy(const std::string& npy, const std::string& where) {
  const Header header = HeaderOf(npy, where);
  const DType type = TypeFromDescr(Field(header.text, "'descr': '", '\'', where), where);
  const bool fortran = Field(header.text, "'fortran_order': ", ',', where) == "True";
  HostTensor tensor =
      HostTensor{type, ShapeFromText(Field(header.text, "'shape': (", ')', where), where), {}};
  const std::size_t bytes = npy.size() - header.data_at;
  if (!HasBytes(tensor.shape, BytesOf(type), bytes)) {
    throw Error(where, "is cut off or damaged: " + TextOf(tensor.shape) + " " + NameOf(type) +
                           " do not take the " + std::to_string(bytes) + " bytes that it has");
  }
  tensor.data.resize(bytes);
  if (bytes != 0) std::memcpy(tensor.data.data(), npy.data() + header.data_at, bytes);
  if (fortran) tensor.data = InCOrder(tensor);
  return tensor;
}

namespace {

constexpr std::string_view kLetters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

}  // namespace

std::string Base64FromBytes(const std::string& bytes) {
  std::string text;
  text.reserve((bytes.size() + 2) / 3 * 4);
  for (std::size_t at = 0; at < bytes.size(); at += 3) {
    const std::size_t count = std::min<std::size_t>(3, bytes.size() - at);
    std::uint32_t bits = 0;
    for (std::size_t byte = 0; byte < 3; ++byte) {
      bits = (bits << 8U) | (byte < count ? static_cast<unsigned char>(bytes[at + byte]) : 0U);
    }
    for (std::size_t letter = 0; letter < 4; ++letter) {
      text += letter <= count ? kLetters[(bits >> (18U - (6U * letter))) & 63U] : '=';
    }
  }
  return text;
}

std::string BytesFromBase64(const std::string& text, const std::string& where) {
  std::array<std::int8_t, 256> values{};
  values.fill(-1);
  for (std::size_t value = 0; value < kLetters.size(); ++value) {
    values[static_cast<unsigned char>(kLetters[value])] = static_cast<std::int8_t>(value);
  }
  std::size_t padding = 0;
  while (padding < 2 && padding < text.size() && text[text.size() - 1 - padding] == '=') ++padding;
  std::string bytes;
  bytes.reserve(text.size() / 4 * 3);
  std::uint32_t bits = 0;
  for (std::size_t at = 0; at < text.size() - padding; ++at) {
    const std::int8_t value = values[static_cast<unsigned char>(text[at])];
    if (value < 0) throw Error(where, "is not base64");
    bits = (bits << 6U) | static_cast<std::uint32_t>(value);
    if (at % 4 != 0) bytes += static_cast<char>((bits >> (6U - (2U * (at % 4)))) & 0xFFU);
  }
  if (text.size() % 4 != 0) throw Error(where, "is not base64: its end is missing");
  return bytes;
}

}  // namespace fptq_run
