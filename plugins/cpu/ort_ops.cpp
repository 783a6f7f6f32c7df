// Operators of ONNX Runtime, domain `fptq.cpu`, over the kernels of w4a8_cpu.h and on ONNX Runtime's own threads.
//
//   FptqW4A8GemmStatic(x, x_scale, codes, scales, ...) -> y, ...
//   FptqW4A8GemmPerToken(x, codes, scales, ...) -> y, ...
//     x FLOAT [..., k]; x_scale FLOAT, one number; then one to three weights that are multiplied with the same x, each as
//     codes INT4 [k, n] and scales FLOAT16 [k / group_size, n]; a y FLOAT [..., n] for each. Attribute group_size. All but
//     x are constants.
//   FptqSkipNormW4A8Gemm...(x, skip, gamma, ...) -> sum, y, ...
//     As above, for the x that SkipSimplifiedLayerNormalization makes of FLOAT x, skip [..., k] and gamma [k] with the
//     attribute epsilon; sum is x + skip.
//   FptqSwiGluW4A8Gemm...(gate, up, ...) -> y, ...
//     As above, for x = gate * sigmoid(gate) * up, FLOAT [..., k].
//   FptqHalfLinear(x, w) -> y
//     x FLOAT [..., k]; w FLOAT16, a constant: [n, k], or [k, n] with the attribute inputs_first 1; y FLOAT [..., n].
//   FptqCachedAttention(q, k, v, past_key, past_value, total[, cosines, sines]) -> y, present_key, present_value
//     q FLOAT [b, s, heads * d]; k, v FLOAT [b, s, kv_heads * d]; the cache before and after FLOAT [b, kv_heads, slots, d],
//     the same memory or not; total INT32, one number: tokens in the cache after the call; cosines, sines FLOAT
//     [b, s, d / 2], with which the halves of q and k are rotated; y as q. Every sequence is full, and a token sees those up
//     to itself. Attributes num_heads, kv_num_heads, scale. Keys lie in the order of attention_cpu.h.
//
// The environment variable FPTQ_CPU_INSTRUCTION_SET (avx512_vnni, avx2, scalar) names the kernels in place of the fastest.
#include <array>
#include <span>
#include <utility>

#include "ort_attention.h"
#include "ort_half.h"
#include "ort_w4a8.h"

namespace fptq::ort {
namespace {

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

constexpr size_t kMostWeights = 3;

// x or what it is made of, then its scale where it is static, then the weights.
template <typename Prologue, bool IS_STATIC>
constexpr auto w4a8_inputs() {
  constexpr size_t kFirst = Prologue::kInputs + (IS_STATIC ? 1 : 0);
  std::array<int, kFirst + 2 * kMostWeights> types{};
  for (size_t i = 0; i < types.size(); ++i) {
    types[i] = i < kFirst ? kFloat : (i - kFirst) % 2 == 0 ? kInt4 : kFloat16;
  }
  return types;
}

template <typename Prologue, bool IS_STATIC>
Op w4a8_op(const char* name) {
  static constexpr auto kInputs = w4a8_inputs<Prologue, IS_STATIC>();
  constexpr size_t kRequiredInputs = kInputs.size() - 2 * (kMostWeights - 1);
  Op op = make_op(name, kInputs, kRequiredInputs, Prologue::kOutputs + kMostWeights);
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return create<W4A8Kernel<Prologue>>(api, info, kernel, IS_STATIC);
  };
  set_kernel<W4A8Kernel<Prologue>>(op);
  return op;
}

template <typename Kernel>
Op op_of(const char* name, std::span<const int> inputs, size_t required_inputs, size_t outputs) {
  Op op = make_op(name, inputs, required_inputs, outputs);
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return create<Kernel>(api, info, kernel);
  };
  set_kernel<Kernel>(op);
  return op;
}

constexpr std::array kHalfInputs{kFloat, kFloat16};
constexpr std::array kAttentionInputs{kFloat, kFloat, kFloat, kFloat, kFloat, kInt32, kFloat, kFloat};

auto make_ops() {
  return std::array{w4a8_op<NoPrologue, true>("FptqW4A8GemmStatic"),
                    w4a8_op<NoPrologue, false>("FptqW4A8GemmPerToken"),
                    w4a8_op<SkipNorm, true>("FptqSkipNormW4A8GemmStatic"),
                    w4a8_op<SkipNorm, false>("FptqSkipNormW4A8GemmPerToken"),
                    w4a8_op<SwiGlu, true>("FptqSwiGluW4A8GemmStatic"),
                    w4a8_op<SwiGlu, false>("FptqSwiGluW4A8GemmPerToken"),
                    op_of<HalfKernel>("FptqHalfLinear", kHalfInputs, 2, 1),
                    op_of<AttentionKernel>("FptqCachedAttention", kAttentionInputs, 6, 3)};
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
  static const auto ops = make_ops();
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
