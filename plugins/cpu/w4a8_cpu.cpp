// Checks, choice of the kernels and threads; the arithmetic is in vector_kernels.h.
#include "w4a8_cpu.h"

#include <atomic>
#include <cstring>
#include <span>
#include <system_error>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "problem.h"

namespace fptq::cpu {
namespace {

// One row is too little work to start a thread for.
constexpr int32_t kRowsPerThread = 16;

// The workspace: INT8 codes, FP32 scales and the starts of the accumulators, each on a cache line of its own.
struct Workspace {
  size_t scales, starts, bytes;  // offsets and total

  explicit Workspace(const FptqCpuProblem& problem) {
    const size_t rows = static_cast<size_t>(problem.m);
    scales = align(rows * code_stride(problem.k));
    starts = scales + align(rows * sizeof(float));
    bytes = starts + align(rows * groups_of(problem.k, problem.group_size) * sizeof(int32_t));
  }

 private:
  static constexpr size_t align(size_t size) { return FPTQ_ROUND_UP(size, size_t{FPTQ_CPU_ALIGNMENT}); }
};

// Runs work(0) .. work(count - 1) on up to `threads` threads, this one included, and returns when all are
// done.
template <typename Work>
void parallel_for(int32_t count, int32_t threads, const Work& work) {
  std::atomic<int32_t> next{0};
  const auto take = [&] {
    for (int32_t i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::jthread> helpers;
  try {
    for (int32_t i = 1; i < std::min(threads, count); ++i) helpers.emplace_back(take);
  } catch (const std::system_error&) {
    // The system has no more threads to give. Those that run share the work, and results do not depend on
    // their number.
  } catch (const std::bad_alloc&) {
    // As above.
  }
  take();
}

FptqStatus check_problem(const FptqCpuProblem& problem, FptqCpuInstructionSet instruction_set,
                         int32_t threads) {
  if (const FptqStatus status = check_weight(problem.n, problem.k, problem.group_size); status != FPTQ_OK)
    return status;
  if (problem.m < 1 || threads < 1) return FPTQ_BAD_SHAPE;
  return fptqCpuSupports(instruction_set) != 0 ? FPTQ_OK : FPTQ_UNSUPPORTED_DEVICE;
}

bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % FPTQ_CPU_ALIGNMENT == 0;
}

FptqStatus check_workspace(const FptqCpuProblem& problem, const FptqCpuArgs& args) {
  if (args.x == nullptr || args.workspace == nullptr) return FPTQ_NULL_POINTER;
  if (!is_aligned(args.workspace)) return FPTQ_BAD_ALIGNMENT;
  return args.workspace_bytes < Workspace(problem).bytes ? FPTQ_SMALL_WORKSPACE : FPTQ_OK;
}

FptqStatus check_weight_pointers(const FptqCpuArgs& args) {
  if (args.packed_codes == nullptr || args.packed_scales == nullptr || args.y == nullptr)
    return FPTQ_NULL_POINTER;
  return is_aligned(args.packed_codes) && is_aligned(args.packed_scales) ? FPTQ_OK : FPTQ_BAD_ALIGNMENT;
}

QuantizeArgs quantize_args(const FptqCpuProblem& problem, const FptqCpuArgs& args) {
  const Workspace workspace(problem);
  auto* base = static_cast<unsigned char*>(args.workspace);
  return {
      .x = args.x,
      .input_type = problem.input_type,
      .per_token = problem.activation_mode == FPTQ_PER_TOKEN,
      .x_scale = args.x_scale,
      .k = problem.k,
      .code_stride = static_cast<int32_t>(code_stride(problem.k)),
      .groups = groups_of(problem.k, problem.group_size),
      .group_k = problem.group_size == 0 ? problem.k : problem.group_size,
      .codes = reinterpret_cast<int8_t*>(base),
      .scales = reinterpret_cast<float*>(base + workspace.scales),
      .starts = reinterpret_cast<int32_t*>(base + workspace.starts),
  };
}

MultiplyArgs multiply_args(const FptqCpuProblem& problem, const FptqCpuArgs& args,
                           const QuantizeArgs& quantized) {
  return {
      .codes = quantized.codes,
      .x_scales = quantized.scales,
      .starts = quantized.starts,
      .m = problem.m,
      .n = problem.n,
      .code_stride = quantized.code_stride,
      .groups = quantized.groups,
      .group_k = problem.group_size == 0 ? padded_k(problem.k) : problem.group_size,
      .w_codes = args.packed_codes,
      .w_scales = static_cast<const uint16_t*>(args.packed_scales),
      .bias = args.bias,
      .output_type = problem.output_type,
      .y = args.y,
  };
}

void quantize_rows(const QuantizeArgs& args, const Kernels& kernels, int32_t m, int32_t threads) {
  parallel_for(m, std::min(threads, m / kRowsPerThread),
               [&](int32_t row) { kernels.quantize_row(args, row); });
}

void quantize_rows(const QuantizeArgs& args, const Kernels& kernels, int32_t m, const FptqCpuPool& pool) {
  const int32_t chunks = FPTQ_ROUND_UP(m, kRowsPerThread) / kRowsPerThread;
  const auto quantize_chunk = [&](int32_t chunk) {
    const int32_t end = std::min(m, (chunk + 1) * kRowsPerThread);
    for (int32_t row = chunk * kRowsPerThread; row < end; ++row) kernels.quantize_row(args, row);
  };
  if (chunks == 1) return quantize_chunk(0);
  run_on(pool, chunks, quantize_chunk);
}

FptqStatus check_parts(const FptqCpuProblem& problem, const FptqCpuPart* parts, int32_t part_count) {
  if (parts == nullptr) return FPTQ_NULL_POINTER;
  if (part_count < 1) return FPTQ_BAD_SHAPE;
  for (const FptqCpuPart& part : std::span(parts, static_cast<size_t>(part_count))) {
    if (part.packed_codes == nullptr || part.packed_scales == nullptr || part.y == nullptr)
      return FPTQ_NULL_POINTER;
    if (!is_aligned(part.packed_codes) || !is_aligned(part.packed_scales)) return FPTQ_BAD_ALIGNMENT;
    const FptqStatus status = check_weight(part.n, problem.k, problem.group_size);
    if (status != FPTQ_OK) return status;
  }
  return FPTQ_OK;
}

void run_parts(const FptqCpuProblem& problem, const Kernels& kernels, const FptqCpuPool& pool,
               const FptqCpuArgs& args, std::span<const FptqCpuPart> parts) {
  const QuantizeArgs quantize = quantize_args(problem, args);
  quantize_rows(quantize, kernels, problem.m, pool);
  std::vector<MultiplyArgs> multiply;
  int32_t blocks = 0;
  for (const FptqCpuPart& part : parts) {
    MultiplyArgs& one = multiply.emplace_back(multiply_args(problem, args, quantize));
    one.n = part.n;
    one.w_codes = part.packed_codes;
    one.w_scales = static_cast<const uint16_t*>(part.packed_scales);
    one.bias = nullptr;
    one.y = part.y;
    blocks += blocks_of(part.n);
  }
  run_on(pool, blocks, [&](int32_t block) {
    size_t part = 0;
    for (; block >= blocks_of(multiply[part].n); ++part) block -= blocks_of(multiply[part].n);
    kernels.multiply_block(multiply[part], block);
  });
}

FptqStatus run(const FptqCpuProblem* problem, FptqCpuInstructionSet instruction_set, int32_t threads,
               const FptqCpuArgs* args, bool only_sums) {
  if (problem == nullptr || args == nullptr) return FPTQ_NULL_POINTER;
  FptqStatus status = check_problem(*problem, instruction_set, threads);
  if (status == FPTQ_OK) status = check_weight_pointers(*args);
  if (status == FPTQ_OK) status = check_workspace(*problem, *args);
  if (status != FPTQ_OK) return status;
  const Kernels& kernels = kernels_of(instruction_set);
  const QuantizeArgs quantize = quantize_args(*problem, *args);
  quantize_rows(quantize, kernels, problem->m, threads);
  const MultiplyArgs multiply = multiply_args(*problem, *args, quantize);
  const auto run_block = only_sums ? kernels.sum_block : kernels.multiply_block;
  parallel_for(blocks_of(problem->n), threads, [&](int32_t block) { run_block(multiply, block); });
  return FPTQ_OK;
}

}  // namespace
}  // namespace fptq::cpu

using namespace fptq::cpu;

extern "C" {

int32_t fptqCpuSupports(FptqCpuInstructionSet instruction_set) {
  switch (instruction_set) {
    case FPTQ_CPU_SCALAR:
      return 1;
#ifdef FPTQ_CPU_X86
    // These ask cpuid, and the system through XGETBV whether it saves the wide registers.
    case FPTQ_CPU_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case FPTQ_CPU_AVX512_VNNI:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vnni");
#endif
    default:
      return 0;
  }
}

size_t fptqCpuPackedCodeBytes(int32_t n, int32_t k) {
  return static_cast<size_t>(blocks_of(n)) * (padded_k(k) / kStepK) * kStepBytes;
}

size_t fptqCpuPackedScaleBytes(int32_t n, int32_t k, int32_t group_size) {
  return static_cast<size_t>(blocks_of(n)) * groups_of(k, group_size) * kBlockN * sizeof(uint16_t);
}

size_t fptqCpuWorkspaceBytes(const FptqCpuProblem* problem) { return Workspace(*problem).bytes; }

FptqStatus fptqCpuQuantizeActivation(const FptqCpuProblem* problem, FptqCpuInstructionSet instruction_set,
                                     int32_t threads, const FptqCpuArgs* args, int8_t* codes, float* scales) {
  if (problem == nullptr || args == nullptr || codes == nullptr || scales == nullptr)
    return FPTQ_NULL_POINTER;
  FptqStatus status = check_problem(*problem, instruction_set, threads);
  if (status == FPTQ_OK) status = check_workspace(*problem, *args);
  if (status != FPTQ_OK) return status;
  const QuantizeArgs quantize = quantize_args(*problem, *args);
  quantize_rows(quantize, kernels_of(instruction_set), problem->m, threads);
  for (int32_t row = 0; row < problem->m; ++row) {
    std::memcpy(codes + static_cast<size_t>(row) * problem->k,
                quantize.codes + static_cast<size_t>(row) * quantize.code_stride,
                static_cast<size_t>(problem->k));
  }
  std::memcpy(scales, quantize.scales, static_cast<size_t>(problem->m) * sizeof(float));
  return FPTQ_OK;
}

FptqStatus fptqCpuW4A8Linear(const FptqCpuProblem* problem, FptqCpuInstructionSet instruction_set,
                             int32_t threads, const FptqCpuArgs* args) {
  return run(problem, instruction_set, threads, args, false);
}

FptqStatus fptqCpuW4A8Linears(const FptqCpuProblem* problem, FptqCpuInstructionSet instruction_set,
                              const FptqCpuPool* pool, const FptqCpuArgs* args, const FptqCpuPart* parts,
                              int32_t part_count) {
  if (problem == nullptr || args == nullptr || pool == nullptr) return FPTQ_NULL_POINTER;
  FptqStatus status = check_parts(*problem, parts, part_count);
  if (status == FPTQ_OK && problem->m < 1) status = FPTQ_BAD_SHAPE;
  if (status == FPTQ_OK && fptqCpuSupports(instruction_set) == 0) status = FPTQ_UNSUPPORTED_DEVICE;
  if (status == FPTQ_OK) status = check_workspace(*problem, *args);
  if (status != FPTQ_OK) return status;
  run_parts(*problem, kernels_of(instruction_set), *pool, *args,
            std::span(parts, static_cast<size_t>(part_count)));
  return FPTQ_OK;
}

FptqStatus fptqCpuHalfLinear(int32_t m, int32_t n, int32_t k, FptqCpuInstructionSet instruction_set,
                             const FptqCpuPool* pool, const float* x, const void* w, float* y) {
  if (pool == nullptr || x == nullptr || w == nullptr || y == nullptr) return FPTQ_NULL_POINTER;
  if (m < 1 || n < 1 || k < 1) return FPTQ_BAD_SHAPE;
  if (fptqCpuSupports(instruction_set) == 0) return FPTQ_UNSUPPORTED_DEVICE;
  const HalfArgs args{.x = x, .w = static_cast<const _Float16*>(w), .y = y, .m = m, .n = n, .k = k};
  const Kernels& kernels = kernels_of(instruction_set);
  run_on(*pool, blocks_of(n), [&](int32_t block) { kernels.half_block(args, block); });
  return FPTQ_OK;
}

FptqStatus fptqCpuGroupSums(const FptqCpuProblem* problem, FptqCpuInstructionSet instruction_set,
                            int32_t threads, const FptqCpuArgs* args) {
  return run(problem, instruction_set, threads, args, true);
}

}  // extern "C"
