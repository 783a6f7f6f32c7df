// Operators of ONNX Runtime, domain `fptq.cpu`, over the kernels of w4a8_cpu.h and on ONNX Runtime's own threads.
//
//   FptqW4A8GemmStatic(x, x_scale, codes, scales, ...) -> y, ...
//   FptqW4A8GemmPerToken(x, codes, scales, ...) -> y, ...
//     x FLOAT [..., k]; x_scale FLOAT, one number; then one to three weights that are multiplied with the same x, each as
//     codes INT4 [k, n] and scales FLOAT16 [k / group_size, n]; a y FLOAT [..., n] for each. Attribute group_size. All but
//     x are constants.
//   FptqHalfLinear(x, w) -> y
//     x FLOAT [..., k]; w FLOAT16, a constant: [n, k], or [k, n] with the attribute inputs_first 1; y FLOAT [..., n].
#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>
#include <memory>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "fptq/layout.h"
#include "ort_abi.h"
#include "w4a8_cpu.h"

namespace fptq::ort {
namespace {

// A status that ONNX Runtime hands on; it is never released here, because it always leaves through a return.
struct Failed {
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status != nullptr) throw Failed{status};
}

void check(FptqStatus status) {
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

FptqCpuInstructionSet fastest_instruction_set() {
  for (const auto candidate : {FPTQ_CPU_AVX512_VNNI, FPTQ_CPU_AVX2}) {
    if (fptqCpuSupports(candidate) != 0) return candidate;
  }
  return FPTQ_CPU_SCALAR;
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

constexpr size_t kAnyRank = SIZE_MAX;

Tensor constant(const Api& api, const OrtKernelInfo* info, size_t index, int type, size_t rank) {
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

// What every kernel does with its activation: [..., k] as rows, and outputs [..., n].
struct Rows {
  Tensor x;
  int32_t count = 1;

  Rows(const Api& api, OrtKernelContext* context, int64_t k) : x(api, input(api, context)) {
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
    OrtValue* value = nullptr;
    void* data = nullptr;
    check(api.output(context, index, dims.data(), dims.size(), &value));
    check(api.mutable_data(value, &data));
    return data;
  }

 private:
  static const OrtValue* input(const Api& api, OrtKernelContext* context) {
    const OrtValue* value = nullptr;
    check(api.input(context, 0, &value));
    return value;
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

// A weight in the order of the kernels.
struct Weight {
  int32_t n;
  AlignedBytes codes, scales;

  // From ONNX order, [k, n] with the even element in the low nibble.
  Weight(const Tensor& onnx_codes, const Tensor& onnx_scales, int32_t k, int32_t group_size)
      : n(static_cast<int32_t>(onnx_codes.dims[1])) {
    const auto* nibbles = static_cast<const uint8_t*>(onnx_codes.data);
    std::vector<int8_t> by_channel(static_cast<size_t>(n) * k);
    for (size_t row = 0; row < static_cast<size_t>(k); ++row) {
      for (size_t column = 0; column < static_cast<size_t>(n); ++column) {
        const size_t element = row * n + column;
        const int nibble = nibbles[element / 2] >> (element % 2 * 4) & 15;
        by_channel[column * k + row] = static_cast<int8_t>((nibble ^ 8) - 8);
      }
    }
    const size_t groups = group_size == 0 ? 1 : static_cast<size_t>(k / group_size);
    const auto* from = static_cast<const uint16_t*>(onnx_scales.data);
    std::vector<uint16_t> scales_by_channel(n * groups);
    for (size_t group = 0; group < groups; ++group) {
      for (size_t column = 0; column < static_cast<size_t>(n); ++column) {
        scales_by_channel[column * groups + group] = from[group * n + column];
      }
    }
    codes.reserve(fptqCpuPackedCodeBytes(n, k));
    scales.reserve(fptqCpuPackedScaleBytes(n, k, group_size));
    check(fptqCpuPackWeight(n, k, group_size, by_channel.data(), scales_by_channel.data(), codes.data(),
                            scales.data()));
  }
};

class W4A8Kernel {
 public:
  W4A8Kernel(const Api& api, const OrtKernelInfo* info, bool is_static)
      : api_(api), instruction_set_(fastest_instruction_set()) {
    int64_t group_size = 0;
    size_t inputs = 0;
    check(api.int_attribute(info, "group_size", &group_size));
    check(api.input_count(info, &inputs));
    const size_t first = is_static ? 2 : 1;
    if (inputs < first + 2 || (inputs - first) % 2 != 0) throw std::runtime_error("a weight is incomplete");
    const int64_t k = constant(api, info, first, kInt4, 2).dims[0];
    if (k > INT32_MAX || group_size < 1 || group_size > k) throw std::runtime_error("group_size does not fit");
    constexpr std::array<int32_t, FPTQ_NUM_GROUP_SIZES> kGroupSizes = FPTQ_GROUP_SIZES;
    const bool has_kernel = std::ranges::find(kGroupSizes, group_size) != kGroupSizes.end();
    problem_ = {1,
                1,
                static_cast<int32_t>(k),
                static_cast<int32_t>(group_size == k && !has_kernel ? 0 : group_size),
                is_static ? FPTQ_STATIC : FPTQ_PER_TOKEN,
                FPTQ_CPU_FLOAT32,
                FPTQ_CPU_FLOAT32};
    if (is_static) x_scale_ = *static_cast<const float*>(constant(api, info, 1, kFloat, kAnyRank).data);
    for (size_t i = first; i < inputs; i += 2) {
      const Tensor codes = constant(api, info, i, kInt4, 2), scales = constant(api, info, i + 1, kFloat16, 2);
      if (codes.dims[0] != k || codes.dims[1] > INT32_MAX || scales.dims[0] * group_size != k ||
          scales.dims[1] != codes.dims[1]) {
        throw std::runtime_error("codes and scales do not fit");
      }
      weights_.emplace_back(codes, scales, problem_.k, problem_.group_size);
    }
  }

  void compute(OrtKernelContext* context) const {
    const Rows rows(api_, context, problem_.k);
    std::vector<FptqCpuPart> parts;
    for (const Weight& weight : weights_) {
      void* y = rows.output(api_, context, parts.size(), weight.n);
      parts.push_back({weight.n, weight.codes.data(), weight.scales.data(), y});
    }
    if (rows.count == 0) return;
    FptqCpuProblem problem = problem_;
    problem.m = rows.count;
    thread_local AlignedBytes workspace;  // one call at a time on a thread, and no thread is inside two kernels
    workspace.reserve(fptqCpuWorkspaceBytes(&problem));
    const FptqCpuArgs args{.x = rows.x.data,
                           .x_scale = x_scale_,
                           .packed_codes = nullptr,
                           .packed_scales = nullptr,
                           .bias = nullptr,
                           .y = nullptr,
                           .workspace = workspace.data(),
                           .workspace_bytes = workspace.size()};
    Pool pool{api_, context};
    const FptqCpuPool c_pool = pool.c_pool();
    check(fptqCpuW4A8Linears(&problem, instruction_set_, &c_pool, &args, parts.data(),
                             static_cast<int32_t>(parts.size())));
    check(pool.status);
  }

 private:
  Api api_;
  FptqCpuInstructionSet instruction_set_;
  FptqCpuProblem problem_{};
  float x_scale_ = 0.0f;
  std::vector<Weight> weights_;
};

class HalfKernel {
 public:
  HalfKernel(const Api& api, const OrtKernelInfo* info)
      : api_(api), instruction_set_(fastest_instruction_set()) {
    const Tensor w = constant(api, info, 1, kFloat16, 2);
    int64_t inputs_first = 0;
    check(api.int_attribute(info, "inputs_first", &inputs_first));
    n_ = w.dims[inputs_first == 0 ? 0 : 1];
    k_ = w.dims[inputs_first == 0 ? 1 : 0];
    if (n_ < 1 || k_ < 1 || n_ > INT32_MAX || k_ > INT32_MAX) throw std::runtime_error("w has no shape for it");
    w_ = static_cast<const uint16_t*>(w.data);  // of the session, which outlives its kernels
    if (inputs_first != 0) transpose();
  }

  void compute(OrtKernelContext* context) const {
    const Rows rows(api_, context, k_);
    void* y = rows.output(api_, context, 0, n_);
    if (rows.count == 0) return;
    Pool pool{api_, context};
    const FptqCpuPool c_pool = pool.c_pool();
    check(fptqCpuHalfLinear(rows.count, static_cast<int32_t>(n_), static_cast<int32_t>(k_), instruction_set_,
                            &c_pool, static_cast<const float*>(rows.x.data), w_, static_cast<float*>(y)));
    check(pool.status);
  }

 private:
  // A copy of its own with the input channels of an output side by side.
  void transpose() {
    by_output_.resize(static_cast<size_t>(n_ * k_));
    for (int64_t row = 0; row < k_; ++row) {
      for (int64_t column = 0; column < n_; ++column) by_output_[column * k_ + row] = w_[row * n_ + column];
    }
    w_ = by_output_.data();  // a moved vector keeps its memory
  }

  Api api_;
  FptqCpuInstructionSet instruction_set_;
  int64_t n_ = 0, k_ = 0;
  const uint16_t* w_ = nullptr;
  std::vector<uint16_t> by_output_;
};

// An operator: its name, the types of its inputs, and how many of those and of the outputs must be there.
struct Op : OrtCustomOp {
  const char* name;
  std::span<const int> inputs;
  size_t required_inputs, outputs;
};

template <typename Kernel, typename... Args>
OrtStatus* create(const OrtApi* table, const OrtKernelInfo* info, void** kernel, Args... args) {
  const Api api(table);
  return guarded(api, [&] { *kernel = new std::pair<Api, Kernel>(api, Kernel(api, info, args...)); });
}

template <typename Kernel>
void set_kernel(Op& op) {
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const auto& [api, self] = *static_cast<std::pair<Api, Kernel>*>(kernel);
    return guarded(api, [&] { self.compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<std::pair<Api, Kernel>*>(kernel); };
}

Op make_op(const char* name, std::span<const int> inputs, size_t required_inputs, size_t outputs) {
  Op op{};
  op.version = kCustomOpVersion;
  op.name = name;
  op.inputs = inputs;
  op.required_inputs = required_inputs;
  op.outputs = outputs;
  op.GetName = [](const OrtCustomOp* self) { return static_cast<const Op*>(self)->name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // CPU
  op.GetInputType = [](const OrtCustomOp* self, size_t i) { return static_cast<const Op*>(self)->inputs[i]; };
  op.GetInputTypeCount = [](const OrtCustomOp* self) { return static_cast<const Op*>(self)->inputs.size(); };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return kFloat; };
  op.GetOutputTypeCount = [](const OrtCustomOp* self) { return static_cast<const Op*>(self)->outputs; };
  op.GetInputCharacteristic = [](const OrtCustomOp* self, size_t i) {
    return i < static_cast<const Op*>(self)->required_inputs ? kRequired : kOptional;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) { return i == 0 ? kRequired : kOptional; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return kDefaultMemory; };
  return op;
}

constexpr std::array kStaticInputs{kFloat, kFloat, kInt4, kFloat16, kInt4, kFloat16, kInt4, kFloat16};
constexpr std::array kPerTokenInputs{kFloat, kInt4, kFloat16, kInt4, kFloat16, kInt4, kFloat16};
constexpr std::array kHalfInputs{kFloat, kFloat16};
constexpr size_t kMostWeights = 3;

std::array<Op, 3> make_ops() {
  std::array<Op, 3> ops{make_op("FptqW4A8GemmStatic", kStaticInputs, 4, kMostWeights),
                        make_op("FptqW4A8GemmPerToken", kPerTokenInputs, 3, kMostWeights),
                        make_op("FptqHalfLinear", kHalfInputs, 2, 1)};
  ops[0].CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return create<W4A8Kernel>(api, info, kernel, true);
  };
  ops[1].CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return create<W4A8Kernel>(api, info, kernel, false);
  };
  ops[2].CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return create<HalfKernel>(api, info, kernel);
  };
  set_kernel<W4A8Kernel>(ops[0]);
  set_kernel<W4A8Kernel>(ops[1]);
  set_kernel<HalfKernel>(ops[2]);
  return ops;
}

}  // namespace
}  // namespace fptq::ort

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  using namespace fptq::ort;
  const OrtApi* table = base->GetApi(kApiVersion);
  if (table == nullptr) {
    // A status needs a table; version 1 has the function that makes it.
    return Api(base->GetApi(1)).create_status("the operators of fptq.cpu need ONNX Runtime 1.18 or newer");
  }
  const Api api(table);
  static const std::array<Op, 3> ops = make_ops();
  return guarded(api, [&] {
    // Lives as long as the process: sessions hold on to it, and ONNX Runtime does not say when the last one ends.
    static OrtCustomOpDomain* const domain = [&] {
      OrtCustomOpDomain* made = nullptr;
      check(api.create_domain("fptq.cpu", &made));
      for (const Op& op : ops) check(api.add_op(made, &op));
      return made;
    }();
    check(api.add_domain(options, domain));
  });
}
