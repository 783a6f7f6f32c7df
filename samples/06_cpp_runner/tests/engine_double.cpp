#include "engine_double.h"

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "fptq_run/error.h"

namespace fptq_run {
namespace {

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
    device_.Queue([&spec = spec_, shapes = shapes_, addresses = addresses_, &device = device_] {
      ++device.calls;
      RunTinyModel(spec, shapes, addresses);
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
      for (const int kind : {0, 1}) AddCache(CacheName(layer, kind), length);
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

}  // namespace

std::unique_ptr<Engine> TinyModelEngine(const Spec& spec, HostDevice& device) {
  return std::make_unique<EngineDouble>(spec, device);
}

}  // namespace fptq_run
