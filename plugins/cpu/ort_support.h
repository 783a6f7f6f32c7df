// What the operators share: errors, tensors and threads of ONNX Runtime.
#ifndef FPTQ_CPU_ORT_SUPPORT_H
#define FPTQ_CPU_ORT_SUPPORT_H

#include <array>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fptq/layout.h"
#include "ort_abi.h"
#include "w4a8_cpu.h"

namespace fptq::ort {

// A status that ONNX Runtime hands on; it is never released here, because it always leaves through a return.
struct Failed {
  OrtStatus* status;
};

inline void check(OrtStatus* status) {
  if (status != nullptr) throw Failed{status};
}

inline void check(FptqStatus status) {
  if (status != FPTQ_OK) {
    throw std::runtime_error("the CPU kernels refuse the call with status " + std::to_string(status));
  }
}

// Calls work() and turns what it throws into a status.
template <typename Work>
OrtStatus* guarded(const Api& api, const Work& work) noexcept {
  try {
    work();
    return nullptr;
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::exception& error) {
    return api.create_status(error.what());
  }
}

class AlignedBytes {
 public:
  void reserve(size_t size) {
    if (size <= size_) return;
    const size_t rounded = FPTQ_ROUND_UP(size, size_t{FPTQ_CPU_ALIGNMENT});
    bytes_.reset(static_cast<uint8_t*>(std::aligned_alloc(FPTQ_CPU_ALIGNMENT, rounded)));
    if (bytes_ == nullptr) throw std::bad_alloc();
    size_ = rounded;
  }
  uint8_t* data() const { return bytes_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(uint8_t* bytes) const { std::free(bytes); }
  };
  std::unique_ptr<uint8_t, Free> bytes_;
  size_t size_ = 0;
};

// The fastest of the machine, or the one that FPTQ_CPU_INSTRUCTION_SET names: to look for a fault, or to get the same floats
// on two machines.
inline FptqCpuInstructionSet chosen_instruction_set() {
  constexpr std::array<std::pair<const char*, FptqCpuInstructionSet>, 3> kFastestFirst{
      {{"avx512_vnni", FPTQ_CPU_AVX512_VNNI}, {"avx2", FPTQ_CPU_AVX2}, {"scalar", FPTQ_CPU_SCALAR}}};
  const char* wanted = std::getenv("FPTQ_CPU_INSTRUCTION_SET");
  for (const auto& [name, set] : kFastestFirst) {
    if ((wanted == nullptr || std::string(wanted) == name) && fptqCpuSupports(set) != 0) return set;
  }
  throw std::runtime_error("this machine does not run FPTQ_CPU_INSTRUCTION_SET=" + std::string(wanted));
}

// A tensor of ONNX Runtime.
struct Tensor {
  std::vector<int64_t> dims;
  void* data = nullptr;
  int type = 0;

  Tensor(const Api& api, const OrtValue* value) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api.type_and_shape(value, &info));
    size_t rank = 0;
    OrtStatus* status = api.rank(info, &rank);
    dims.resize(rank);
    if (status == nullptr) status = api.dimensions(info, dims.data(), rank);
    if (status == nullptr) status = api.element_type(info, &type);
    api.release(info);
    check(status);
    check(api.mutable_data(const_cast<OrtValue*>(value), &data));
  }
};

inline constexpr size_t kAnyRank = SIZE_MAX;

inline Tensor constant(const Api& api, const OrtKernelInfo* info, size_t index, int type, size_t rank) {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(api.constant_input(info, index, &is_constant, &value));
  if (is_constant == 0) throw std::runtime_error("input " + std::to_string(index) + " is not a constant");
  Tensor tensor(api, value);
  if (tensor.type != type || (rank != kAnyRank && tensor.dims.size() != rank)) {
    throw std::runtime_error("input " + std::to_string(index) + " has another type or rank than it must");
  }
  return tensor;
}

inline Tensor input(const Api& api, OrtKernelContext* context, size_t index) {
  const OrtValue* value = nullptr;
  check(api.input(context, index, &value));
  return Tensor(api, value);
}

inline void* output(const Api& api, OrtKernelContext* context, size_t index,
                    const std::vector<int64_t>& dims) {
  OrtValue* value = nullptr;
  void* data = nullptr;
  check(api.output(context, index, dims.data(), dims.size(), &value));
  check(api.mutable_data(value, &data));
  return data;
}

// What the linears do with their activation: [..., k] as rows, and outputs [..., n].
struct Rows {
  Tensor x;
  int32_t count = 1;

  Rows(const Api& api, OrtKernelContext* context, int64_t k) : x(input(api, context, 0)) {
    if (x.dims.empty() || x.dims.back() != k) {
      throw std::runtime_error("x does not have " + std::to_string(k) + " channels");
    }
    const int64_t rows =
        std::accumulate(x.dims.begin(), x.dims.end() - 1, int64_t{1}, std::multiplies<int64_t>());
    if (rows > INT32_MAX) throw std::runtime_error("x has too many rows");
    count = static_cast<int32_t>(rows);
  }

  void* output(const Api& api, OrtKernelContext* context, size_t index, int64_t n) const {
    std::vector<int64_t> dims = x.dims;
    dims.back() = n;
    return ort::output(api, context, index, dims);
  }
};

// The threads of ONNX Runtime for the time of one call. A failure of the pool itself is kept, not thrown: it passes
// through C.
struct Pool {
  const Api& api;
  OrtKernelContext* context;
  OrtStatus* status = nullptr;

  FptqCpuPool c_pool() {
    return {this, [](void* self, size_t count, void (*work)(void*, size_t), void* data) {
              auto* pool = static_cast<Pool*>(self);
              if (pool->status == nullptr)
                pool->status = pool->api.parallel_for(pool->context, work, count, data);
            }};
  }
};

}  // namespace fptq::ort

#endif  // FPTQ_CPU_ORT_SUPPORT_H
