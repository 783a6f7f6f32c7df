// FptqHalfLinear.
#ifndef FPTQ_CPU_ORT_HALF_H
#define FPTQ_CPU_ORT_HALF_H

#include <algorithm>

#include "ort_support.h"
#include "weight_memory.h"

namespace fptq::ort {

class HalfKernel {
 public:
  HalfKernel(const Api& api, const OrtKernelInfo* info)
      : api_(api), instruction_set_(chosen_instruction_set()) {
    const Tensor w = constant(api, info, 1, kFloat16, 2);
    int64_t inputs_first = 0;
    check(api.int_attribute(info, "inputs_first", &inputs_first));
    n_ = w.dims[inputs_first == 0 ? 0 : 1];
    k_ = w.dims[inputs_first == 0 ? 1 : 0];
    if (n_ < 1 || k_ < 1 || n_ > INT32_MAX || k_ > INT32_MAX)
      throw std::runtime_error("w has no shape for it");
    w_ = cpu::weight_memory(static_cast<size_t>(n_ * k_) * sizeof(uint16_t));
    copy(static_cast<const uint16_t*>(w.data), inputs_first != 0);
  }

  void compute(OrtKernelContext* context) const {
    const Rows rows(api_, context, k_);
    void* y = rows.output(api_, context, 0, n_);
    if (rows.count == 0) return;
    Pool pool{api_, context};
    const FptqCpuPool c_pool = pool.c_pool();
    check(fptqCpuHalfLinear(rows.count, static_cast<int32_t>(n_), static_cast<int32_t>(k_), instruction_set_,
                            &c_pool, static_cast<const float*>(rows.x.data), w_.get(),
                            static_cast<float*>(y)));
    check(pool.status);
  }

 private:
  // A copy with the input channels of an output side by side: what the session holds lies in small pages.
  void copy(const uint16_t* from, bool inputs_first) {
    auto* to = reinterpret_cast<uint16_t*>(w_.get());
    if (!inputs_first) {
      std::copy_n(from, n_ * k_, to);
      return;
    }
    for (int64_t row = 0; row < k_; ++row) {
      for (int64_t column = 0; column < n_; ++column) to[column * k_ + row] = from[row * n_ + column];
    }
  }

  Api api_;
  FptqCpuInstructionSet instruction_set_;
  int64_t n_ = 0, k_ = 0;
  std::shared_ptr<uint8_t> w_;  // FP16 [n, k]
};

}  // namespace fptq::ort

#endif  // FPTQ_CPU_ORT_HALF_H
