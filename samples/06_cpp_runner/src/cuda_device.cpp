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

#define FPTQ_DRIVER(member, function, symbol) \
  decltype(&(function)) member = library_.Get<std::remove_pointer_t<decltype(&(function))>>(symbol)

 private:
  SharedLibrary library_;

 public:
  FPTQ_DRIVER(init, cuInit, "cuInit");
  FPTQ_DRIVER(error_string, cuGetErrorString, "cuGetErrorString");
  FPTQ_DRIVER(count, cuDeviceGetCount, "cuDeviceGetCount");
  FPTQ_DRIVER(get, cuDeviceGet, "cuDeviceGet");
  FPTQ_DRIVER(name, cuDeviceGetName, "cuDeviceGetName");
  FPTQ_DRIVER(attribute, cuDeviceGetAttribute, "cuDeviceGetAttribute");
  FPTQ_DRIVER(retain, cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
  FPTQ_DRIVER(release, cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2");
  FPTQ_DRIVER(set_current, cuCtxSetCurrent, "cuCtxSetCurrent");
  FPTQ_DRIVER(stream_create, cuStreamCreate, "cuStreamCreate");
  FPTQ_DRIVER(stream_destroy, cuStreamDestroy, "cuStreamDestroy_v2");
  FPTQ_DRIVER(synchronize, cuStreamSynchronize, "cuStreamSynchronize");
  FPTQ_DRIVER(allocate, cuMemAlloc, "cuMemAlloc_v2");
  FPTQ_DRIVER(free, cuMemFree, "cuMemFree_v2");
  FPTQ_DRIVER(to_device, cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2");
  FPTQ_DRIVER(to_host, cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2");
  FPTQ_DRIVER(set_bytes, cuMemsetD8Async, "cuMemsetD8Async");
  FPTQ_DRIVER(begin_capture, cuStreamBeginCapture, "cuStreamBeginCapture_v2");
  FPTQ_DRIVER(end_capture, cuStreamEndCapture, "cuStreamEndCapture");
  FPTQ_DRIVER(instantiate, cuGraphInstantiateWithFlags, "cuGraphInstantiateWithFlags");
  FPTQ_DRIVER(launch, cuGraphLaunch, "cuGraphLaunch");
  FPTQ_DRIVER(graph_destroy, cuGraphDestroy, "cuGraphDestroy");
  FPTQ_DRIVER(exec_destroy, cuGraphExecDestroy, "cuGraphExecDestroy");

#undef FPTQ_DRIVER

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
