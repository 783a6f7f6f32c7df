#include "tensorrt_engine.h"

#include <NvInferRuntime.h>

#include <filesystem>
#include <fstream>
#include <mutex>

#include "fptq_run/error.h"

namespace fptq_run {
namespace {

constexpr std::int32_t kRtxMajor = 1;

// Keeps what TensorRT calls an error, for the message of the Error that follows.
class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR) return;
    const std::scoped_lock lock(mutex_);
    errors_ += (errors_.empty() ? "" : "; ") + std::string(message);
  }

  std::string Take() {
    const std::scoped_lock lock(mutex_);
    std::string errors = errors_.empty() ? "it says no reason" : errors_;
    errors_.clear();
    return errors;
  }

 private:
  std::mutex mutex_;
  std::string errors_;
};

DType TypeOf(nvinfer1::DataType type, const std::string& name) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return DType::kFloat32;
    case nvinfer1::DataType::kHALF:
      return DType::kFloat16;
    case nvinfer1::DataType::kBF16:
      return DType::kBFloat16;
    case nvinfer1::DataType::kINT8:
      return DType::kInt8;
    case nvinfer1::DataType::kUINT8:
      return DType::kUInt8;
    case nvinfer1::DataType::kINT32:
      return DType::kInt32;
    case nvinfer1::DataType::kINT64:
      return DType::kInt64;
    case nvinfer1::DataType::kBOOL:
      return DType::kBool;
    default:
      throw Error(name, "has an element type that this runner does not know");
  }
}

Shape ShapeFrom(const nvinfer1::Dims& dims) { return {dims.d, dims.d + dims.nbDims}; }

nvinfer1::Dims DimsFrom(const Shape& shape) {
  nvinfer1::Dims dims{};
  dims.nbDims = static_cast<std::int32_t>(shape.size());
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    dims.d[axis] = static_cast<decltype(dims.d[axis] + 0)>(shape[axis]);
  }
  return dims;
}

class TensorRtContext final : public Context {
 public:
  TensorRtContext(std::unique_ptr<nvinfer1::IExecutionContext> context, Logger& logger, StreamDevice& device)
      : context_(std::move(context)), logger_(logger), device_(device) {}

  void SetInputShape(const std::string& name, const Shape& shape) override {
    if (!context_->setInputShape(name.c_str(), DimsFrom(shape))) {
      throw Error(name, "cannot be " + TextOf(shape) + " (" + logger_.Take() + ")");
    }
  }
  [[nodiscard]] Shape OutputShape(const std::string& name) const override {
    Shape shape = ShapeFrom(context_->getTensorShape(name.c_str()));
    for (const std::int64_t size : shape) {
      if (size < 0) throw Error(name, "has a shape that depends on values (" + logger_.Take() + ")");
    }
    return shape;
  }
  void SetAddress(const std::string& name, Address address) override {
    if (!context_->setTensorAddress(name.c_str(), address)) throw Error(name, logger_.Take());
  }
  void Enqueue() override {
    if (!context_->enqueueV3(static_cast<cudaStream_t>(device_.Stream()))) {
      throw Error("engine", "cannot be run (" + logger_.Take() + ")");
    }
  }

 private:
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  Logger& logger_;
  StreamDevice& device_;
};

class TensorRtEngine final : public Engine {
 public:
  TensorRtEngine(const SharedLibrary& library, const std::string& plan, const std::string& plugin,
                 StreamDevice& device)
      : device_(device) {
    auto* create = library.Get<void*(void*, std::int32_t)>("createInferRuntime_INTERNAL");
    runtime_.reset(static_cast<nvinfer1::IRuntime*>(create(&logger_, NV_TENSORRT_VERSION)));
    if (runtime_ == nullptr) throw Error(library.path(), "gives no runtime (" + logger_.Take() + ")");
    LoadPlugin(plugin);
    Deserialize(plan);
    for (std::int32_t index = 0; index < engine_->getNbIOTensors(); ++index) {
      tensors_.push_back(InfoOf(engine_->getIOTensorName(index)));
    }
  }

  [[nodiscard]] const std::vector<TensorInfo>& Tensors() const override { return tensors_; }
  [[nodiscard]] int ProfileCount() const override { return engine_->getNbOptimizationProfiles(); }

  std::unique_ptr<Context> CreateContext(int profile) override {
    std::unique_ptr<nvinfer1::IExecutionContext> context(engine_->createExecutionContext());
    if (context == nullptr) throw Error("engine", "gives no execution context (" + logger_.Take() + ")");
    if (!context->setOptimizationProfileAsync(profile, static_cast<cudaStream_t>(device_.Stream()))) {
      throw Error("engine", "cannot take profile " + std::to_string(profile) + " (" + logger_.Take() + ")");
    }
    device_.Synchronize();
    return std::make_unique<TensorRtContext>(std::move(context), logger_, device_);
  }

 private:
  void LoadPlugin(const std::string& plugin) {
    if (plugin == kEmbedded) {
      runtime_->setEngineHostCodeAllowed(true);
    } else if (!plugin.empty() && runtime_->getPluginRegistry().loadLibrary(
                                      std::filesystem::absolute(plugin).c_str()) == nullptr) {
      throw Error(plugin, "TensorRT cannot load this plugin library (" + logger_.Take() + ")",
                  "build it: python -m fptq_export.plugin build");
    }
  }

  void Deserialize(const std::string& plan) {
    std::vector<char> bytes(std::filesystem::file_size(plan));
    std::ifstream file(plan, std::ios::binary);
    if (!file.read(bytes.data(), static_cast<std::streamsize>(bytes.size())))
      throw Error(plan, "cannot be read");
    engine_.reset(runtime_->deserializeCudaEngine(bytes.data(), bytes.size()));
    if (engine_ == nullptr) {
      throw Error(plan, "TensorRT does not open it: " + logger_.Take(),
                  "build it again: fptq-export build DIR --engine FILE");
    }
  }

  TensorInfo InfoOf(const char* name) const {
    TensorInfo info;
    info.name = name;
    info.is_input = engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
    info.type = TypeOf(engine_->getTensorDataType(name), name);
    info.shape = ShapeFrom(engine_->getTensorShape(name));
    if (engine_->getTensorLocation(name) != nvinfer1::TensorLocation::kDEVICE) {
      throw Error(name, "lies in the memory of the host, which this runner does not give");
    }
    for (std::int32_t profile = 0; info.is_input && profile < engine_->getNbOptimizationProfiles();
         ++profile) {
      const auto end = [&](nvinfer1::OptProfileSelector select) {
        const nvinfer1::Dims dims = engine_->getProfileShape(name, profile, select);
        return dims.nbDims < 0 ? info.shape : ShapeFrom(dims);  // an input of fixed shape has no range
      };
      info.ranges.push_back(
          {end(nvinfer1::OptProfileSelector::kMIN), end(nvinfer1::OptProfileSelector::kMAX)});
    }
    return info;
  }

  // Destroyed from the last to the first: the engine before its runtime, and that before the logger.
  StreamDevice& device_;
  Logger logger_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::vector<TensorInfo> tensors_;
};

}  // namespace

SharedLibrary OpenTensorRt(const std::string& target, const std::string& path) {
  constexpr const char* kNext = "install it, or give its file with --library or FPTQ_TENSORRT_LIBRARY";
  if (!path.empty()) return {{path}, kNext};
  if (target == kRtx) return {{"libtensorrt_rtx.so.1"}, kNext};
  return {{"libnvinfer.so.11", "libnvinfer.so.10"}, kNext};
}

LibraryFacts FactsOf(const SharedLibrary& library) {
  std::string version;
  for (const char* part : {"Major", "Minor", "Patch", "Build"}) {
    const std::string name = std::string("getInferLib") + part + "Version";
    version += (version.empty() ? "" : ".") + std::to_string(library.Get<std::int32_t()>(name.c_str())());
  }
  const bool rtx = library.Get<std::int32_t()>("getInferLibMajorVersion")() == kRtxMajor;
  return {library.path(), rtx ? kRtx : kEnterprise, version};
}

std::unique_ptr<Engine> LoadEngine(const SharedLibrary& library, const std::string& plan,
                                   const std::string& plugin, StreamDevice& device) {
  const std::int32_t major = library.Get<std::int32_t()>("getInferLibMajorVersion")();
  if (major != NV_TENSORRT_MAJOR) {
    throw Error(library.path(),
                "is version " + FactsOf(library).version +
                    ", and fptq-run was compiled with headers of TensorRT " +
                    std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR),
                "compile it with the headers of this library: cmake -DTENSORRT_INCLUDE_DIR=DIR");
  }
  return std::make_unique<TensorRtEngine>(library, plan, plugin, device);
}

}  // namespace fptq_run
