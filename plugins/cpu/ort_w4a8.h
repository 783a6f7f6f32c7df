// FptqW4A8GemmStatic and FptqW4A8GemmPerToken, also with a norm or a gate before them.
#ifndef FPTQ_CPU_ORT_W4A8_H
#define FPTQ_CPU_ORT_W4A8_H

#include <algorithm>
#include <array>

#include "ort_prologue.h"
#include "ort_support.h"
#include "weight_memory.h"

namespace fptq::ort {

// A weight in the order of the kernels.
struct Weight {
  int32_t n;
  std::shared_ptr<uint8_t> codes, scales;

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
    codes = cpu::weight_memory(fptqCpuPackedCodeBytes(n, k));
    scales = cpu::weight_memory(fptqCpuPackedScaleBytes(n, k, group_size));
    check(fptqCpuPackWeight(n, k, group_size, by_channel.data(), scales_by_channel.data(), codes.get(),
                            scales.get()));
  }
};

template <typename Prologue>
class W4A8Kernel {
 public:
  W4A8Kernel(const Api& api, const OrtKernelInfo* info, bool is_static)
      : api_(api), instruction_set_(chosen_instruction_set()), prologue_(api, info) {
    int64_t group_size = 0;
    size_t inputs = 0;
    check(api.int_attribute(info, "group_size", &group_size));
    check(api.input_count(info, &inputs));
    const size_t first = Prologue::kInputs + (is_static ? 1 : 0);
    if (inputs < first + 2 || (inputs - first) % 2 != 0) throw std::runtime_error("a weight is incomplete");
    const int64_t k = constant(api, info, first, kInt4, 2).dims[0];
    if (k > INT32_MAX || group_size < 1 || group_size > k)
      throw std::runtime_error("group_size does not fit");
    constexpr std::array<int32_t, FPTQ_NUM_GROUP_SIZES> kGroupSizes = FPTQ_GROUP_SIZES;
    const bool has_kernel = std::ranges::find(kGroupSizes, group_size) != kGroupSizes.end();
    problem_ = {1,
                1,
                static_cast<int32_t>(k),
                static_cast<int32_t>(group_size == k && !has_kernel ? 0 : group_size),
                is_static ? FPTQ_STATIC : FPTQ_PER_TOKEN,
                FPTQ_CPU_FLOAT32,
                FPTQ_CPU_FLOAT32};
    if (is_static)
      x_scale_ = *static_cast<const float*>(constant(api, info, Prologue::kInputs, kFloat, kAnyRank).data);
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
    Pool pool{api_, context};
    thread_local AlignedBytes x_memory,
        workspace;  // one call at a time on a thread, and none is inside two kernels
    const float* x = prologue_.run(rows, context, instruction_set_, pool, x_memory);
    std::vector<FptqCpuPart> parts;
    for (const Weight& weight : weights_) {
      void* y = rows.output(api_, context, Prologue::kOutputs + parts.size(), weight.n);
      parts.push_back({weight.n, weight.codes.get(), weight.scales.get(), y});
    }
    if (rows.count == 0) return;
    FptqCpuProblem problem = problem_;
    problem.m = rows.count;
    workspace.reserve(fptqCpuWorkspaceBytes(&problem));
    const FptqCpuArgs args{.x = x,
                           .x_scale = x_scale_,
                           .packed_codes = nullptr,
                           .packed_scales = nullptr,
                           .bias = nullptr,
                           .y = nullptr,
                           .workspace = workspace.data(),
                           .workspace_bytes = workspace.size()};
    const FptqCpuPool c_pool = pool.c_pool();
    check(fptqCpuW4A8Linears(&problem, instruction_set_, &c_pool, &args, parts.data(),
                             static_cast<int32_t>(parts.size())));
    check(pool.status);
  }

 private:
  Api api_;
  FptqCpuInstructionSet instruction_set_;
  Prologue prologue_;
  FptqCpuProblem problem_{};
  float x_scale_ = 0.0f;
  std::vector<Weight> weights_;
};

}  // namespace fptq::ort

#endif  // FPTQ_CPU_ORT_W4A8_H
