#include "machine_double.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <vector>

#include "fptq_run/error.h"

namespace fptq_run {
namespace {

using Work = std::function<void()>;
constexpr std::size_t kHeaderBytes = 32;

class HostDevice;

class RecordedGraph final : public Graph {
 public:
  RecordedGraph(HostDevice& device, std::vector<Work> work) : device_(device), work_(std::move(work)) {}
  void Launch() override;

 private:
  HostDevice& device_;
  std::vector<Work> work_;
};

class HostDevice final : public Device {
 public:
  HostDevice(std::string compute_capability, int fail_allocation, bool report)
      : compute_capability_(std::move(compute_capability)),
        fail_allocation_(fail_allocation),
        report_(report) {}
  HostDevice(const HostDevice&) = delete;
  HostDevice& operator=(const HostDevice&) = delete;
  ~HostDevice() override {
    if (report_)
      std::fprintf(stderr, "double: %d calls, %d captures, %d launches\n", calls, captures_, launches);
    if (!memory_.empty()) {
      std::fprintf(stderr, "double: %zu buffers were not freed\n", memory_.size());
      std::abort();
    }
  }

  [[nodiscard]] std::string Name() const override { return "a double"; }
  [[nodiscard]] std::string ComputeCapability() const override { return compute_capability_; }

  Address Allocate(std::size_t bytes) override {
    if (++allocations_ == fail_allocation_)
      throw Error("GPU", "allocating " + std::to_string(bytes) + " bytes: out of memory");
    std::vector<std::byte> block(std::max<std::size_t>(bytes, 1),
                                 std::byte{0xFF});  // NaN in every float type
    Address address = block.data();
    memory_.emplace(address, std::move(block));
    return address;
  }
  void Free(Address address) noexcept override { memory_.erase(address); }

  void CopyToDevice(Address to, const void* from, std::size_t bytes) override {
    Queue([=] { std::memcpy(to, from, bytes); }, bytes);
  }
  void CopyToHost(void* to, Address from, std::size_t bytes) override {
    Queue([=] { std::memcpy(to, from, bytes); }, bytes);
  }
  void Zero(Address address, std::size_t bytes) override {
    Queue([=] { std::memset(address, 0, bytes); }, bytes);
  }
  void Synchronize() override {
    const std::vector<Work> work = std::exchange(queue_, {});
    for (const Work& item : work) item();
  }
  std::unique_ptr<Graph> Capture(const Work& work) override {
    ++captures_;
    const std::vector<Work> before = std::exchange(queue_, {});
    try {
      work();
    } catch (...) {
      queue_ = before;
      throw;
    }
    return std::make_unique<RecordedGraph>(*this, std::exchange(queue_, before));
  }

  void Queue(Work work, std::size_t bytes = 1) {
    if (bytes != 0) queue_.push_back(std::move(work));
  }

  int calls = 0;
  int launches = 0;

 private:
  std::string compute_capability_;
  int fail_allocation_;
  bool report_;
  int allocations_ = 0;
  int captures_ = 0;
  std::map<Address, std::vector<std::byte>> memory_;
  std::vector<Work> queue_;
};

void RecordedGraph::Launch() {
  ++device_.launches;
  for (const Work& item : work_) device_.Queue(item);
}

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
        two_profiles(settings.Number("two_profiles", 0) != 0) {}

  [[nodiscard]] std::int64_t slots() const { return past + input; }
};

DType TypeNamed(const std::string& name) {
  for (const DType type :
       {DType::kInt8, DType::kInt32, DType::kInt64, DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    if (NameOf(type) == name) return type;
  }
  throw Error(name, "is no element type of the double");
}

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

// One call, with the shapes and addresses that were set when it was queued.
struct Call {
  const Spec* spec;
  std::map<std::string, Shape> shapes;
  std::map<std::string, Address> addresses;

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

  static std::string Name(std::int64_t layer, int kind) {
    return std::to_string(layer) + (kind == 0 ? ".key" : ".value");
  }

  // The old tokens of a growing cache, then the new ones; a static one is written in place.
  void Extend(std::int64_t layer, int kind) const {
    const std::string name = Name(layer, kind);
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
      const std::string name = "present." + Name(layer, kind);
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
    const std::string name = "present." + Name(layer, kind);
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

class ContextDouble final : public Context {
 public:
  ContextDouble(const Spec& spec, const std::vector<TensorInfo>& tensors, std::size_t profile,
                HostDevice& device)
      : spec_(spec), tensors_(tensors), profile_(profile), device_(device) {}

  void SetInputShape(const std::string& name, const Shape& shape) override {
    if (!Fits(Info(name).ranges[profile_], shape)) throw Error(name, "cannot be " + TextOf(shape));
    shapes_[name] = shape;
  }
  [[nodiscard]] Shape OutputShape(const std::string& name) const override {
    const Shape& ids = shapes_.at("input_ids");
    if (name == "logits") return {ids[0], spec_.logits == "last" ? 1 : ids[1], spec_.vocabulary};
    Shape shape = shapes_.at("past_key_values." + name.substr(std::strlen("present.")));
    if (!spec_.is_static) shape[2] += ids[1];
    return shape;
  }
  void SetAddress(const std::string& name, Address address) override {
    if (Info(name).name.empty()) throw Error(name, "is no tensor");
    addresses_[name] = address;
  }
  void Enqueue() override {
    for (const TensorInfo& tensor : tensors_) {
      if (!addresses_.contains(tensor.name)) throw Error(tensor.name, "has no address");
      const bool present = tensor.name.starts_with("present.");
      const std::string past =
          present ? "past_key_values." + tensor.name.substr(std::strlen("present.")) : "";
      if (present && spec_.is_static != (addresses_.at(tensor.name) == addresses_[past])) {
        throw Error(tensor.name, "has an address that does not fit the form of the cache");
      }
    }
    device_.Queue([call = Call{&spec_, shapes_, addresses_}, &device = device_] {
      ++device.calls;
      call.Run();
    });
  }

 private:
  [[nodiscard]] const TensorInfo& Info(const std::string& name) const {
    for (const TensorInfo& tensor : tensors_) {
      if (tensor.name == name) return tensor;
    }
    throw Error(name, "is no tensor of the engine");
  }

  const Spec& spec_;
  const std::vector<TensorInfo>& tensors_;
  std::size_t profile_;
  HostDevice& device_;
  std::map<std::string, Shape> shapes_;
  std::map<std::string, Address> addresses_;
};

class EngineDouble final : public Engine {
 public:
  EngineDouble(const Spec& spec, HostDevice& device) : spec_(spec), device_(device) {
    const DType ids = TypeNamed(spec.ids);
    const std::int64_t length = spec.is_static ? spec.slots() : -1;
    AddInput("input_ids", ids, {-1, -1});
    AddInput("attention_mask", ids, {-1, length});
    AddInput("position_ids", ids, {-1, -1});
    if (spec.is_static) AddInput("write_indices", ids, {-1});
    tensors_.push_back({"logits", false, TypeNamed(spec.type), {-1, -1, spec.vocabulary}, {}});
    for (std::int64_t layer = 0; layer < spec.layers; ++layer) {
      for (const int kind : {0, 1}) AddCache(Call::Name(layer, kind), length);
    }
  }

  [[nodiscard]] const std::vector<TensorInfo>& Tensors() const override { return tensors_; }
  [[nodiscard]] int ProfileCount() const override { return spec_.two_profiles ? 2 : 1; }
  std::unique_ptr<Context> CreateContext(int profile) override {
    return std::make_unique<ContextDouble>(spec_, tensors_, static_cast<std::size_t>(profile), device_);
  }

 private:
  void AddCache(const std::string& name, std::int64_t length) {
    const DType type = TypeNamed(spec_.int8 ? "int8" : spec_.type);
    const std::string past = "past_key_values." + name;
    AddInput(past, type, {-1, spec_.heads, length, spec_.width});
    tensors_.push_back({"present." + name, false, type, {-1, spec_.heads, length, spec_.width}, {}});
    if (!spec_.int8) return;
    AddInput(past + "_scale", DType::kFloat32, {-1, spec_.heads, length, 1});
    tensors_.push_back(
        {"present." + name + "_scale", false, DType::kFloat32, {-1, spec_.heads, length, 1}, {}});
  }

  void AddInput(const std::string& name, DType type, Shape shape) {
    TensorInfo info{name, true, type, shape, {}};
    for (int profile = 0; profile < ProfileCount(); ++profile) {
      const bool prompt = !spec_.two_profiles || profile == 0;
      const bool decode = !spec_.two_profiles || profile == 1;
      const std::int64_t tokens = prompt ? spec_.input : 1;
      const std::int64_t past = decode ? spec_.past : 0;
      Range range{shape, shape};
      range.minimum[0] = 1;
      range.maximum[0] = spec_.batch;
      const std::size_t axis = name.starts_with("past") ? 2 : 1;
      if (shape.size() > axis && shape[axis] < 0) {
        const bool mask = name == "attention_mask";
        range.minimum[axis] = axis == 2 ? 0 : 1;
        range.maximum[axis] = axis == 2 ? past : mask ? past + tokens : tokens;
      }
      info.ranges.push_back(range);
    }
    tensors_.push_back(info);
  }

  Spec spec_;
  HostDevice& device_;
  std::vector<TensorInfo> tensors_;
};

class Double final : public Machine {
 public:
  Double() {
    const char* text = std::getenv("FPTQ_DOUBLE");
    std::istringstream words(text == nullptr ? "" : text);
    settings_ = Settings(words);
  }

  LibraryFacts OpenLibrary(const std::string& /*target*/, const std::string& path) override {
    return {path.empty() ? "libtensorrt_rtx.so.1" : path, settings_.Text("target", kRtx),
            settings_.Text("library_version", "1.7.1.116")};
  }
  std::string PluginInfo(const std::string& path) override {
    std::ifstream file(path);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  std::unique_ptr<Device> OpenDevice() override {
    if (settings_.Number("gpu", 1) == 0)
      throw Error("GPU", "no NVIDIA GPU is visible, and an engine is loaded into one");
    auto device = std::make_unique<HostDevice>(settings_.Text("compute_capability", "8.9"),
                                               static_cast<int>(settings_.Number("fail_allocation", 0)),
                                               settings_.Number("report", 0) != 0);
    device_ = device.get();
    return device;
  }
  std::unique_ptr<Engine> OpenEngine(const std::string& plan, const std::string& /*plugin*/,
                                     Device& /*device*/) override {
    std::ifstream file(plan, std::ios::binary);
    file.seekg(kHeaderBytes);
    return std::make_unique<EngineDouble>(Spec(Settings(file)), *device_);
  }

 private:
  Settings settings_;
  HostDevice* device_ = nullptr;
};

}  // namespace

std::unique_ptr<Machine> MachineDouble() { return std::make_unique<Double>(); }

std::unique_ptr<Device> DeviceDouble(int fail_allocation, bool report) {
  return std::make_unique<HostDevice>("8.9", fail_allocation, report);
}

}  // namespace fptq_run
