// What the W4A8 operators do before they quantize x.
#ifndef FPTQ_CPU_ORT_PROLOGUE_H
#define FPTQ_CPU_ORT_PROLOGUE_H

#include "ort_support.h"
#include "prologue_cpu.h"

namespace fptq::ort {

// What makes x of the node's first inputs. Each has kInputs and kOutputs, and `run`, which gives x [rows, k] in FP32; `memory` is
// for it.
struct NoPrologue {
  static constexpr size_t kInputs = 1, kOutputs = 0;
  NoPrologue(const Api&, const OrtKernelInfo*) {}
  const float* run(const Rows& rows, OrtKernelContext*, FptqCpuInstructionSet, Pool&, AlignedBytes&) const {
    return static_cast<const float*>(rows.x.data);
  }
};

// Inputs x, skip, gamma; output x + skip.
class SkipNorm {
 public:
  static constexpr size_t kInputs = 3, kOutputs = 1;
  SkipNorm(const Api& api, const OrtKernelInfo* info) : api_(api) {
    check(api.float_attribute(info, "epsilon", &epsilon_));
  }
  const float* run(const Rows& rows, OrtKernelContext* context, FptqCpuInstructionSet set, Pool& pool,
                   AlignedBytes& memory) const {
    const int64_t k = rows.x.dims.back();
    const Tensor skip = input(api_, context, 1), gamma = input(api_, context, 2);
    if (skip.dims != rows.x.dims || gamma.dims != std::vector<int64_t>{k})
      throw std::runtime_error("x, skip and gamma do not fit");
    auto* sum = static_cast<float*>(rows.output(api_, context, 0, k));
    memory.reserve(static_cast<size_t>(rows.count * k) * sizeof(float));
    auto* y = reinterpret_cast<float*>(memory.data());
    const FptqCpuSkipNorm args{rows.count,
                               static_cast<int32_t>(k),
                               static_cast<const float*>(rows.x.data),
                               static_cast<const float*>(skip.data),
                               static_cast<const float*>(gamma.data),
                               epsilon_,
                               sum,
                               y};
    const FptqCpuPool c_pool = pool.c_pool();
    if (rows.count > 0) check(fptqCpuSkipNorm(&args, set, &c_pool));
    return y;
  }

 private:
  Api api_;
  float epsilon_ = 0.0f;
};

// Inputs gate, up.
class SwiGlu {
 public:
  static constexpr size_t kInputs = 2, kOutputs = 0;
  SwiGlu(const Api& api, const OrtKernelInfo*) : api_(api) {}
  const float* run(const Rows& rows, OrtKernelContext* context, FptqCpuInstructionSet set, Pool& pool,
                   AlignedBytes& memory) const {
    const Tensor up = input(api_, context, 1);
    if (up.dims != rows.x.dims) throw std::runtime_error("gate and up do not fit");
    const int64_t k = rows.x.dims.back();
    memory.reserve(static_cast<size_t>(rows.count * k) * sizeof(float));
    auto* y = reinterpret_cast<float*>(memory.data());
    const FptqCpuSwiGlu args{rows.count, static_cast<int32_t>(k), static_cast<const float*>(rows.x.data),
                             static_cast<const float*>(up.data), y};
    const FptqCpuPool c_pool = pool.c_pool();
    if (rows.count > 0) check(fptqCpuSwiGlu(&args, set, &c_pool));
    return y;
  }

 private:
  Api api_;
};

}  // namespace fptq::ort

#endif  // FPTQ_CPU_ORT_PROLOGUE_H
