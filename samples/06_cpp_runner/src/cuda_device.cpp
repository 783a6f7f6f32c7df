#include "cuda_device.h"

#include <cuda.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <string>

#include "shared_library.h"

namespace fptq_run {
namespace {

constexpr const char* kNoGpu = "run it on a machine with an NVIDIA GPU and its driver";

SharedLibrary OpenDriver() {
  try {
    return {{"libcuda.so.1"}, kNoGpu};
  } catch (const Error&) {
    throw Error("GPU",
                "no NVIDIA driver is installed here (libcuda.so.1), and an engine is loaded into a GPU",
                kNoGpu);
  }
}

// Functions of the driver under the names that cuda.h gives them; `_v2` are those that the macros stand for.
class Driver {
 public:
  Driver() : library_(OpenDriver()) {}

 private:
  SharedLibrary library_;

  // Becomes a pointer to whatever function it is assigned to.
  class Symbol {
   public:
    Symbol(const SharedLibrary& library, const char* name) : library_(library), name_(name) {}
    template <typename Function>
    operator Function*() const {  // NOLINT(*-explicit-constructor): it is there to convert
      return library_.Get<Function>(name_);
    }

   private:
    const SharedLibrary& library_;
    const char* name_;
  };
  [[nodiscard]] Symbol Find(const char* name) const { return {library_, name}; }

 public:
  decltype(&cuInit) init = Find("cuInit");
  decltype(&cuGetErrorString) error_string = Find("cuGetErrorString");
  decltype(&cuDeviceGetCount) count = Find("cuDeviceGetCount");
  decltype(&cuDeviceGet) get = Find("cuDeviceGet");
  decltype(&cuDeviceGetName) name = Find("cuDeviceGetName");
  decltype(&cuDeviceGetAttribute) attribute = Find("cuDeviceGetAttribute");
  decltype(&cuDevicePrimaryCtxRetain) retain = Find("cuDevicePrimaryCtxRetain");
  decltype(&cuDevicePrimaryCtxRelease) release = Find("cuDevicePrimaryCtxRelease_v2");
  decltype(&cuCtxSetCurrent) set_current = Find("cuCtxSetCurrent");
  decltype(&cuStreamCreate) stream_create = Find("cuStreamCreate");
  decltype(&cuStreamDestroy) stream_destroy = Find("cuStreamDestroy_v2");
  decltype(&cuStreamSynchronize) synchronize = Find("cuStreamSynchronize");
  decltype(&cuMemAlloc) allocate = Find("cuMemAlloc_v2");
  decltype(&cuMemFree) free = Find("cuMemFree_v2");
  decltype(&cuMemcpyHtoDAsync) to_device = Find("cuMemcpyHtoDAsync_v2");
  decltype(&cuMemcpyDtoHAsync) to_host = Find("cuMemcpyDtoHAsync_v2");
  decltype(&cuMemsetD8Async) set_bytes = Find("cuMemsetD8Async");
  decltype(&cuStreamBeginCapture) begin_capture = Find("cuStreamBeginCapture_v2");
  decltype(&cuStreamEndCapture) end_capture = Find("cuStreamEndCapture");
  decltype(&cuGraphInstantiateWithFlags) instantiate = Find("cuGraphInstantiateWithFlags");
  decltype(&cuGraphLaunch) launch = Find("cuGraphLaunch");
  decltype(&cuGraphDestroy) graph_destroy = Find("cuGraphDestroy");
  decltype(&cuGraphExecDestroy) exec_destroy = Find("cuGraphExecDestroy");

  void Check(CUresult result, const char* what, const char* next = "") const {
    if (result == CUDA_SUCCESS) return;
    const char* text = nullptr;
    error_string(result, &text);
    throw Error("GPU", std::string(what) + ": " + (text == nullptr ? "unknown error" : text), next);
  }
};

CUdeviceptr Pointer(Address address) { return reinterpret_cast<std::uintptr_t>(address); }

class CudaGraph final : public Graph {
 public:
  CudaGraph(const Driver& driver, CUgraph graph, CUstream stream) : driver_(driver), stream_(stream) {
    const CUresult result = driver.instantiate(&exec_, graph, 0);
    driver.graph_destroy(graph);
    driver.Check(result, "the captured work cannot be made a graph", "leave --cuda-graph out");
  }
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;
  ~CudaGraph() override { driver_.exec_destroy(exec_); }

  void Launch() override { driver_.Check(driver_.launch(exec_, stream_), "launching a graph"); }

 private:
  const Driver& driver_;
  CUstream stream_;
  CUgraphExec exec_ = nullptr;
};

// The primary context of a GPU, which TensorRT uses too, as long as this lives.
class PrimaryContext {
 public:
  PrimaryContext(const Driver& driver, CUdevice device) : driver_(driver), device_(device) {
    CUcontext context = nullptr;
    driver.Check(driver.retain(&context, device), "opening it", kNoGpu);
    const CUresult result = driver.set_current(context);
    if (result != CUDA_SUCCESS) driver.release(device);
    driver.Check(result, "making it current");
  }
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;
  ~PrimaryContext() { driver_.release(device_); }

 private:
  const Driver& driver_;
  CUdevice device_;
};

CUdevice FirstDevice(const Driver& driver) {
  driver.Check(driver.init(0), "no NVIDIA GPU is usable", kNoGpu);
  int count = 0;
  driver.Check(driver.count(&count), "no NVIDIA GPU is usable", kNoGpu);
  if (count == 0) throw Error("GPU", "no NVIDIA GPU is visible, and an engine is loaded into one", kNoGpu);
  CUdevice device = 0;
  driver.Check(driver.get(&device, 0), "no NVIDIA GPU is usable", kNoGpu);
  return device;
}

class CudaDevice final : public StreamDevice {
 public:
  CudaDevice() : device_(FirstDevice(driver_)), context_(driver_, device_) {
    driver_.Check(driver_.stream_create(&stream_, CU_STREAM_NON_BLOCKING), "creating a stream");
  }
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;
  ~CudaDevice() override { driver_.stream_destroy(stream_); }

  [[nodiscard]] void* Stream() const override { return stream_; }

  [[nodiscard]] std::string Name() const override {
    std::array<char, 256> name{};
    driver_.Check(driver_.name(name.data(), name.size(), device_), "asking its name");
    return name.data();
  }

  [[nodiscard]] std::string ComputeCapability() const override {
    int major = 0;
    int minor = 0;
    driver_.Check(driver_.attribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device_),
                  "asking what it is");
    driver_.Check(driver_.attribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device_),
                  "asking what it is");
    return std::to_string(major) + "." + std::to_string(minor);
  }

  Address Allocate(std::size_t bytes) override {
    CUdeviceptr pointer = 0;
    const std::string what = "allocating " + std::to_string(bytes) + " bytes";
    driver_.Check(driver_.allocate(&pointer, std::max<std::size_t>(bytes, 1)), what.c_str(),
                  "build the engine for fewer or shorter sequences");
    return reinterpret_cast<Address>(static_cast<std::uintptr_t>(pointer));
  }
  void Free(Address address) noexcept override { driver_.free(Pointer(address)); }

  void CopyToDevice(Address to, const void* from, std::size_t bytes) override {
    if (bytes != 0) driver_.Check(driver_.to_device(Pointer(to), from, bytes, stream_), "copying to it");
  }
  void CopyToHost(void* to, Address from, std::size_t bytes) override {
    if (bytes != 0) driver_.Check(driver_.to_host(to, Pointer(from), bytes, stream_), "copying from it");
  }
  void Zero(Address address, std::size_t bytes) override {
    if (bytes != 0) driver_.Check(driver_.set_bytes(Pointer(address), 0, bytes, stream_), "clearing memory");
  }
  void Synchronize() override { driver_.Check(driver_.synchronize(stream_), "waiting for it"); }

  std::unique_ptr<Graph> Capture(const std::function<void()>& work) override {
    driver_.Check(driver_.begin_capture(stream_, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "beginning a capture");
    std::exception_ptr failure;
    try {
      work();
    } catch (...) {
      failure = std::current_exception();
    }
    CUgraph graph = nullptr;
    const CUresult result = driver_.end_capture(stream_, &graph);
    if (failure != nullptr) {
      if (graph != nullptr) driver_.graph_destroy(graph);
      std::rethrow_exception(failure);
    }
    driver_.Check(result, "this engine's work cannot be captured", "leave --cuda-graph out");
    return std::make_unique<CudaGraph>(driver_, graph, stream_);
  }

 private:
  Driver driver_;
  CUdevice device_;
  PrimaryContext context_;
  CUstream stream_ = nullptr;
};

}  // namespace

std::unique_ptr<StreamDevice> OpenCudaDevice() { return std::make_unique<CudaDevice>(); }

}  // namespace fptq_run
