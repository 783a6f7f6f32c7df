#include "fptq_run/command.h"

#include <algorithm>
#include <array>
#include <exception>
#include <iomanip>

#include "arguments.h"
#include "fptq_run/error.h"
#include "fptq_run/generator.h"
#include "fptq_run/polygraphy_files.h"
#include "fptq_run/single_call.h"

namespace fptq_run {
namespace {

constexpr const char* kRunner = "fptq-run";

// Destroyed from the last to the first.
struct Opened {
  std::unique_ptr<Device> device;
  std::unique_ptr<Engine> engine;
};

// Every check in its order; `see` may stop by throwing.
template <typename See>
Opened Open(const Arguments& arguments, Machine& machine, const See& see) {
  const PlanReport report = ReportOnPlan(arguments.plan, arguments.run);
  for (const Check& check : report.checks) see(check);
  Opened opened;
  if (report.checks.front().status == Status::kProblem) return opened;  // there is no engine to ask about
  if (!report.facts && arguments.library.empty()) {
    throw Error(arguments.plan, "no manifest names it, and its header is not one this tool knows",
                "give its run directory with --run, or the library that built it with --library");
  }
  const LibraryFacts library =
      machine.OpenLibrary(report.facts ? report.facts->target : "", arguments.library);
  std::string plugin = arguments.plugin;
  if (report.facts) {
    if (plugin.empty() && report.facts->carries_plugin()) plugin = kEmbedded;
    const bool is_file = !plugin.empty() && plugin != kEmbedded;
    see(CheckLibrary(*report.facts, library));
    see(CheckPlugin(*report.facts, plugin, is_file ? machine.PluginInfo(plugin) : ""));
  }
  opened.device = machine.OpenDevice();
  if (report.facts) see(CheckGpu(*report.facts, opened.device->Name(), opened.device->ComputeCapability()));
  opened.engine = machine.OpenEngine(arguments.plan, plugin, *opened.device);
  return opened;
}

Opened OpenOrThrow(const Arguments& arguments, Machine& machine) {
  return Open(arguments, machine, [&](const Check& check) { Require(arguments.plan, check); });
}

int RunCheck(const Arguments& arguments, Machine& machine, std::ostream& out) {
  constexpr std::array<const char*, 3> kWords{"ok", "note", "problem"};
  bool has_problem = false;
  const Opened opened = Open(arguments, machine, [&](const Check& check) {
    out << std::left << std::setw(9) << kWords[static_cast<std::size_t>(check.status)] << check.what << ": "
        << check.text << "\n";
    if (check.status != Status::kOk && !check.next.empty()) out << "         -> " << check.next << "\n";
    has_problem = has_problem || check.status == Status::kProblem;
  });
  if (opened.engine != nullptr) out << "ok       opened: TensorRT opened it on this GPU\n";
  return has_problem ? 1 : 0;
}

int RunInfer(const Arguments& arguments, Machine& machine, std::ostream& err) {
  const std::vector<NamedTensors> calls = LoadInputs(arguments.load_inputs);
  const Opened opened = OpenOrThrow(arguments, machine);
  std::vector<IterationResult> results;
  results.reserve(calls.size());
  for (const NamedTensors& inputs : calls) results.push_back(RunOnce(*opened.device, *opened.engine, inputs));
  SaveOutputs(arguments.save_outputs, kRunner, results);
  err << calls.size() << (calls.size() == 1 ? " call" : " calls") << ": " << arguments.save_outputs << "\n";
  return 0;
}

// Rows of the tensor input_ids [B, S] of each call.
std::vector<TokenIds> PromptsFrom(const std::string& path) {
  std::vector<TokenIds> prompts;
  for (const NamedTensors& call : LoadInputs(path)) {
    const auto found =
        std::find_if(call.begin(), call.end(), [](const auto& pair) { return pair.first == "input_ids"; });
    if (found == call.end()) throw Error(path, "has no input_ids");
    const HostTensor& tensor = found->second;
    const bool is_integer = tensor.type == DType::kInt64 || tensor.type == DType::kInt32;
    if (!is_integer) throw Error(path, "input_ids are " + NameOf(tensor.type) + ", not int64 or int32");
    if (tensor.shape.size() != 2)
      throw Error(path, "input_ids are " + TextOf(tensor.shape) + ", not [batch, tokens]");
    const TokenIds ids = tensor.Integers();
    for (std::int64_t row = 0; row < tensor.shape[0]; ++row) {
      const auto start = ids.begin() + (row * tensor.shape[1]);
      prompts.emplace_back(start, start + tensor.shape[1]);
    }
  }
  return prompts;
}

HostTensor PaddedIds(const std::vector<Completion>& completions) {
  std::size_t longest = 0;
  for (const Completion& completion : completions) longest = std::max(longest, completion.ids.size());
  TokenIds padded;
  for (const Completion& completion : completions) {
    padded.insert(padded.end(), completion.ids.begin(), completion.ids.end());
    padded.insert(padded.end(), longest - completion.ids.size(), -1);
  }
  const Shape shape{static_cast<std::int64_t>(completions.size()), static_cast<std::int64_t>(longest)};
  return HostTensor::FromIntegers(DType::kInt64, shape, padded);
}

void PrintTimings(const Timings& timings, std::ostream& err) {
  const auto rate = [](std::int64_t tokens, double seconds) {
    return seconds > 0.0 ? static_cast<double>(tokens) / seconds : 0.0;
  };
  err << std::fixed << std::setprecision(1) << "prompt " << timings.prompt_tokens << " tokens, "
      << timings.prefill_seconds * 1e3 << " ms (" << rate(timings.prompt_tokens, timings.prefill_seconds)
      << " tokens/s); decode " << timings.decode_tokens << " tokens, " << timings.decode_seconds * 1e3
      << " ms (" << rate(timings.decode_tokens, timings.decode_seconds) << " tokens/s)\n";
}

int RunGenerate(const Arguments& arguments, Machine& machine, std::ostream& out, std::ostream& err) {
  const std::vector<TokenIds> prompts =
      arguments.load_inputs.empty() ? arguments.prompts : PromptsFrom(arguments.load_inputs);
  const Opened opened = OpenOrThrow(arguments, machine);
  Generator generator(*opened.device, *opened.engine);
  const std::vector<Completion> completions = generator.Generate(prompts, arguments.request);
  for (std::size_t number = 0; number < completions.size(); ++number) {
    const Completion& completion = completions[number];
    for (std::size_t index = 0; index < completion.ids.size(); ++index) {
      out << (index == 0 ? "" : ",") << completion.ids[index];
    }
    out << "\n";
    if (completion.finish == Finish::kCache) {
      err << "prompt " << number << ": the KV cache is full after " << completion.ids.size() << " tokens\n";
    }
  }
  PrintTimings(generator.timings(), err);
  if (!arguments.save_outputs.empty()) {
    const Timings& timings = generator.timings();
    SaveOutputs(
        arguments.save_outputs, kRunner,
        {{{{"output_ids", PaddedIds(completions)}}, timings.prefill_seconds + timings.decode_seconds}});
  }
  return 0;
}

}  // namespace

int RunCommand(const std::vector<std::string>& words, Machine& machine, std::ostream& out,
               std::ostream& err) {
  try {
    const Arguments arguments = ArgumentsFrom(words);
    if (arguments.verb == "check") return RunCheck(arguments, machine, out);
    if (arguments.verb == "infer") return RunInfer(arguments, machine, err);
    if (arguments.verb == "generate") return RunGenerate(arguments, machine, out, err);
    out << kHelp;
    return 0;
  } catch (const std::exception& error) {
    err << error.what() << "\n";
    return 1;
  }
}

}  // namespace fptq_run
