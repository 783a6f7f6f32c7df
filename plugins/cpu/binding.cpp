// The Python module _w4a8_cpu. It trusts no size: every buffer is compared with what the problem needs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "w4a8_cpu.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using In = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::c_contig, nb::device::cpu>;

void check_status(FptqStatus status) {
  if (status == FPTQ_OK) return;
  const std::string text = "the CPU kernels refuse the call with status " + std::to_string(status);
  throw nb::value_error(text.c_str());
}

template <typename Array>
auto* buffer(const Array& array, const char* name, size_t bytes) {
  if (array.nbytes() == bytes) return array.data();
  const std::string text = std::string(name) + " holds " + std::to_string(array.nbytes()) +
                           " bytes, the problem needs " + std::to_string(bytes);
  throw nb::value_error(text.c_str());
}

size_t float_bytes(FptqCpuFloat type) { return type == FPTQ_CPU_FLOAT16 ? 2 : 4; }

// The activation mode follows from x_scale later.
FptqCpuProblem make_problem(int32_t m, int32_t n, int32_t k, int32_t group_size, bool half_input,
                            bool half_output) {
  const auto type = [](bool half) { return half ? FPTQ_CPU_FLOAT16 : FPTQ_CPU_FLOAT32; };
  return {m, n, k, group_size, FPTQ_PER_TOKEN, type(half_input), type(half_output)};
}

// A problem and its activation; what the three calls share.
struct Call {
  FptqCpuProblem problem;
  FptqCpuArgs args;

  Call(const FptqCpuProblem& the_problem, const In& x, std::optional<float> x_scale, const Out& workspace)
      : problem(the_problem), args{} {
    problem.activation_mode = x_scale.has_value() ? FPTQ_STATIC : FPTQ_PER_TOKEN;
    args.x = buffer(x, "x", elements(problem.k) * float_bytes(problem.input_type));
    args.x_scale = x_scale.value_or(0.0f);
    args.workspace = workspace.data();
    args.workspace_bytes = workspace.nbytes();
  }

  void set_weight(const In& packed_codes, const In& packed_scales) {
    const auto& [m, n, k, group_size, mode, input_type, output_type] = problem;
    args.packed_codes =
        static_cast<const uint8_t*>(buffer(packed_codes, "packed_codes", fptqCpuPackedCodeBytes(n, k)));
    args.packed_scales = buffer(packed_scales, "packed_scales", fptqCpuPackedScaleBytes(n, k, group_size));
  }

  // Elements of a matrix with a row for each token.
  size_t elements(int32_t columns) const { return static_cast<size_t>(problem.m) * columns; }
};

void pack_weight(const FptqCpuProblem& problem, const In& codes, const In& scales, const Out& packed_codes,
                 const Out& packed_scales) {
  const auto& [m, n, k, group_size, mode, input_type, output_type] = problem;
  const size_t groups = group_size == 0 ? 1 : static_cast<size_t>(k / group_size);
  check_status(fptqCpuPackWeight(
      n, k, group_size, static_cast<const int8_t*>(buffer(codes, "codes", static_cast<size_t>(n) * k)),
      buffer(scales, "scales", static_cast<size_t>(n) * groups * 2),
      static_cast<uint8_t*>(buffer(packed_codes, "packed_codes", fptqCpuPackedCodeBytes(n, k))),
      buffer(packed_scales, "packed_scales", fptqCpuPackedScaleBytes(n, k, group_size))));
}

void quantize_activation(const FptqCpuProblem& problem, FptqCpuInstructionSet instruction_set,
                         int32_t threads, const In& x, std::optional<float> x_scale, const Out& workspace,
                         const Out& codes, const Out& scales) {
  const Call call(problem, x, x_scale, workspace);
  auto* to_codes = static_cast<int8_t*>(buffer(codes, "codes", call.elements(problem.k)));
  auto* to_scales = static_cast<float*>(buffer(scales, "scales", call.elements(sizeof(float))));
  nb::gil_scoped_release release;
  check_status(
      fptqCpuQuantizeActivation(&call.problem, instruction_set, threads, &call.args, to_codes, to_scales));
}

void linear(const FptqCpuProblem& problem, FptqCpuInstructionSet instruction_set, int32_t threads,
            const In& x, std::optional<float> x_scale, const In& packed_codes, const In& packed_scales,
            std::optional<In> bias, const Out& workspace, const Out& y) {
  Call call(problem, x, x_scale, workspace);
  call.set_weight(packed_codes, packed_scales);
  if (bias.has_value()) {
    call.args.bias =
        static_cast<const float*>(buffer(*bias, "bias", static_cast<size_t>(problem.n) * sizeof(float)));
  }
  call.args.y = buffer(y, "y", call.elements(problem.n) * float_bytes(problem.output_type));
  nb::gil_scoped_release release;
  check_status(fptqCpuW4A8Linear(&call.problem, instruction_set, threads, &call.args));
}

void group_sums(const FptqCpuProblem& problem, FptqCpuInstructionSet instruction_set, int32_t threads,
                const In& x, std::optional<float> x_scale, const In& packed_codes, const In& packed_scales,
                const Out& workspace, const Out& sums) {
  Call call(problem, x, x_scale, workspace);
  call.set_weight(packed_codes, packed_scales);
  const size_t groups = problem.group_size == 0 ? 1 : static_cast<size_t>(problem.k / problem.group_size);
  call.args.y = buffer(sums, "sums", call.elements(problem.n) * groups * sizeof(int32_t));
  nb::gil_scoped_release release;
  check_status(fptqCpuGroupSums(&call.problem, instruction_set, threads, &call.args));
}

}  // namespace

NB_MODULE(_w4a8_cpu, module) {
  module.doc() = "W4A8 linear on the CPU; used through fptq_export.cpu.";
  nb::enum_<FptqCpuInstructionSet>(module, "InstructionSet")
      .value("SCALAR", FPTQ_CPU_SCALAR)
      .value("AVX2", FPTQ_CPU_AVX2)
      .value("AVX512_VNNI", FPTQ_CPU_AVX512_VNNI);
  nb::class_<FptqCpuProblem>(module, "Problem").def("workspace_bytes", [](const FptqCpuProblem& self) {
    return fptqCpuWorkspaceBytes(&self);
  });
  module.def("make_problem", &make_problem, "m"_a, "n"_a, "k"_a, "group_size"_a, "half_input"_a,
             "half_output"_a);
  module.def(
      "supports", [](FptqCpuInstructionSet set) { return fptqCpuSupports(set) != 0; }, "instruction_set"_a);
  module.def("packed_code_bytes", &fptqCpuPackedCodeBytes, "n"_a, "k"_a);
  module.def("packed_scale_bytes", &fptqCpuPackedScaleBytes, "n"_a, "k"_a, "group_size"_a);
  module.def("pack_weight", &pack_weight, "problem"_a, "codes"_a, "scales"_a, "packed_codes"_a,
             "packed_scales"_a);
  module.def("quantize_activation", &quantize_activation, "problem"_a, "instruction_set"_a, "threads"_a,
             "x"_a, "x_scale"_a.none(), "workspace"_a, "codes"_a, "scales"_a);
  module.def("linear", &linear, "problem"_a, "instruction_set"_a, "threads"_a, "x"_a, "x_scale"_a.none(),
             "packed_codes"_a, "packed_scales"_a, "bias"_a.none(), "workspace"_a, "y"_a);
  module.def("group_sums", &group_sums, "problem"_a, "instruction_set"_a, "threads"_a, "x"_a,
             "x_scale"_a.none(), "packed_codes"_a, "packed_scales"_a, "workspace"_a, "sums"_a);
}
