// FptqCachedAttention.
#ifndef FPTQ_CPU_ORT_ATTENTION_H
#define FPTQ_CPU_ORT_ATTENTION_H

#include <algorithm>
#include <cstring>

#include "attention_cpu.h"
#include "ort_support.h"

namespace fptq::ort {

class AttentionKernel {
 public:
  AttentionKernel(const Api& api, const OrtKernelInfo* info)
      : api_(api), instruction_set_(chosen_instruction_set()) {
    int64_t heads = 0, kv_heads = 0;
    size_t inputs = 0;
    check(api.int_attribute(info, "num_heads", &heads));
    check(api.int_attribute(info, "kv_num_heads", &kv_heads));
    check(api.float_attribute(info, "scale", &problem_.scale));
    check(api.input_count(info, &inputs));
    if (kv_heads < 1 || heads < kv_heads || heads > INT32_MAX || heads % kv_heads != 0) {
      throw std::runtime_error("num_heads is not a multiple of kv_num_heads");
    }
    problem_.heads = static_cast<int32_t>(heads);
    problem_.kv_heads = static_cast<int32_t>(kv_heads);
    rotates_ = inputs == kInputs;
    if (!rotates_ && inputs != kInputs - 2) throw std::runtime_error("cosines and sines come together");
  }

  void compute(OrtKernelContext* context) const {
    const Tensor q = input(api_, context, 0), k = input(api_, context, 1), v = input(api_, context, 2);
    const Tensor keys = input(api_, context, 3), values = input(api_, context, 4),
                 total = input(api_, context, 5);
    FptqCpuAttention args = problem_;
    read_sizes(q, keys, total, args);
    const std::vector<int64_t> kv_dims{args.batch, args.tokens, int64_t{args.kv_heads} * args.size};
    if (k.dims != kv_dims || v.dims != kv_dims || values.dims != keys.dims) {
      throw std::runtime_error("keys, values and their cache do not fit");
    }
    args.q = static_cast<const float*>(q.data);
    args.k = static_cast<const float*>(k.data);
    args.v = static_cast<const float*>(v.data);
    if (rotates_) {
      args.cosines = angles(context, 6, args);
      args.sines = angles(context, 7, args);
    }
    args.y = static_cast<float*>(output(api_, context, 0, q.dims));
    args.keys = present(context, 1, keys);
    args.values = present(context, 2, values);
    Pool pool{api_, context};
    const FptqCpuPool c_pool = pool.c_pool();
    check(fptqCpuAttention(&args, instruction_set_, &c_pool));
    check(pool.status);
  }

 private:
  static constexpr size_t kInputs = 8;

  void read_sizes(const Tensor& q, const Tensor& keys, const Tensor& total, FptqCpuAttention& args) const {
    if (q.dims.size() != 3 || keys.dims.size() != 4 || q.dims[0] != keys.dims[0] ||
        keys.dims[1] != args.kv_heads || q.dims[2] != args.heads * keys.dims[3] ||
        std::ranges::any_of(keys.dims, [](int64_t dim) { return dim > INT32_MAX; })) {
      throw std::runtime_error("queries and the cache do not fit");
    }
    args.batch = static_cast<int32_t>(q.dims[0]);
    args.tokens = static_cast<int32_t>(q.dims[1]);
    args.slots = static_cast<int32_t>(keys.dims[2]);
    args.size = static_cast<int32_t>(keys.dims[3]);
    if (args.size % FPTQ_CPU_PANEL != 0 || args.size > FPTQ_CPU_MAX_HEAD_SIZE ||
        args.slots % FPTQ_CPU_PANEL != 0) {
      throw std::runtime_error("a head of " + std::to_string(args.size) + " channels, or a cache of " +
                               std::to_string(args.slots) + " tokens: the kernel takes multiples of " +
                               std::to_string(FPTQ_CPU_PANEL) + ", and heads of up to " +
                               std::to_string(FPTQ_CPU_MAX_HEAD_SIZE) + " channels");
    }
    args.past = *static_cast<const int32_t*>(total.data) - args.tokens;
    if (q.dims[1] > args.slots || args.past < 0 || args.past > args.slots - args.tokens) {
      throw std::runtime_error("the cache has no room for the tokens");
    }
  }

  const float* angles(OrtKernelContext* context, size_t index, const FptqCpuAttention& args) const {
    const Tensor tensor = input(api_, context, index);
    if (tensor.dims != std::vector<int64_t>{args.batch, args.tokens, args.size / 2}) {
      throw std::runtime_error("cosines and sines do not fit");
    }
    return static_cast<const float*>(tensor.data);
  }

  // The cache after the call: the same memory as before it, where the caller has bound both to it.
  float* present(OrtKernelContext* context, size_t index, const Tensor& past) const {
    auto* data = static_cast<float*>(output(api_, context, index, past.dims));
    if (data != past.data) {
      const int64_t count =
          std::accumulate(past.dims.begin(), past.dims.end(), int64_t{1}, std::multiplies<int64_t>());
      std::memcpy(data, past.data, static_cast<size_t>(count) * sizeof(float));
    }
    return data;
  }

  Api api_;
  FptqCpuInstructionSet instruction_set_;
  FptqCpuAttention problem_{};
  bool rotates_ = false;
};

}  // namespace fptq::ort

#endif  // FPTQ_CPU_ORT_ATTENTION_H
