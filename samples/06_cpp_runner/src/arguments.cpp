#include "arguments.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdlib>
#include <functional>
#include <map>

#include "fptq_run/error.h"

namespace fptq_run {
namespace {

constexpr const char* kSeeHelp = "fptq-run --help lists verbs and options";

template <typename Number>
Number NumberFrom(const std::string& option, const std::string& text) {
  Number number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size())
    throw Error(option, "'" + text + "' is no such number");
  return number;
}

TokenIds IdsFrom(const std::string& option, const std::string& text) {
  TokenIds ids;
  for (std::size_t start = 0; start <= text.size();) {
    const std::size_t end = std::min(text.find(',', start), text.size());
    ids.push_back(NumberFrom<std::int64_t>(option, text.substr(start, end - start)));
    start = end + 1;
  }
  return ids;
}

using Setter = std::function<void(const std::string& option, const std::string& value)>;

std::map<std::string, Setter> SettersOf(Arguments& arguments) {
  const auto text = [](std::string& to) {
    return [&to](const std::string&, const std::string& value) { to = value; };
  };
  const auto number = [](auto& to) {
    return [&to](const std::string& option, const std::string& value) {
      to = NumberFrom<std::remove_reference_t<decltype(to)>>(option, value);
    };
  };
  Request& request = arguments.request;
  return {{"--run", text(arguments.run)},
          {"--library", text(arguments.library)},
          {"--plugin", text(arguments.plugin)},
          {"--load-inputs", text(arguments.load_inputs)},
          {"--save-outputs", text(arguments.save_outputs)},
          {"--max-tokens", number(request.max_tokens)},
          {"--temperature", number(request.sampling.temperature)},
          {"--top-k", number(request.sampling.top_k)},
          {"--top-p", number(request.sampling.top_p)},
          {"--seed", number(request.sampling.seed)},
          {"--ids", [&](const std::string& option,
                        const std::string& value) { arguments.prompts.push_back(IdsFrom(option, value)); }},
          {"--stop-ids", [&](const std::string& option, const std::string& value) {
             request.stop = IdsFrom(option, value);
           }}};
}

void CheckComplete(const Arguments& arguments) {
  constexpr std::array<const char*, 3> kVerbs{"check", "infer", "generate"};
  if (std::find(kVerbs.begin(), kVerbs.end(), arguments.verb) == kVerbs.end()) {
    throw Error("fptq-run", "'" + arguments.verb + "' is no verb", kSeeHelp);
  }
  if (arguments.plan.empty()) throw Error("fptq-run " + arguments.verb, "no engine is given", kSeeHelp);
  if (arguments.verb == "infer" && (arguments.load_inputs.empty() || arguments.save_outputs.empty())) {
    throw Error("fptq-run infer", "needs --load-inputs and --save-outputs", kSeeHelp);
  }
  if (arguments.verb == "generate" && arguments.prompts.empty() == arguments.load_inputs.empty()) {
    throw Error("fptq-run generate", "needs either --ids or --load-inputs", kSeeHelp);
  }
}

}  // namespace

const char* const kHelp =
    R"(Runs an engine of fptq-export: token ids in, token ids out.

  fptq-run check PLAN                      will it load here, and if not, why
  fptq-run generate PLAN --ids 1,2,3       tokens behind a prompt; --ids again for more prompts
  fptq-run infer PLAN --load-inputs IN.json --save-outputs OUT.json
                                           single calls, in files of polygraphy run

  --run DIR              run directory with manifest.json [looked for beside the engine]
  --library FILE         libtensorrt_rtx.so.1 or libnvinfer.so.* [FPTQ_TENSORRT_LIBRARY, else the loader's path]
  --plugin FILE          libfptq_trt.so where the engine needs it, `embedded` where it carries it [what the manifest says]
  --load-inputs FILE     Polygraphy's JSON; generate reads input_ids [B, S] of each call as prompts
  --save-outputs FILE    Polygraphy's JSON; generate writes output_ids [prompts, longest], -1 behind a shorter one

generate:
  --max-tokens N [128]   --stop-ids 2,0   --seed N [0]: prompt i is drawn with seed + i
  --temperature T [0: greedy]   --top-k K [0: all]   --top-p P [1]
  --cuda-graph           decode steps as one launch; needs an engine with --kv-cache static

Examples:
  fptq-run check out.plan --run out
  fptq-run generate out.plan --run out --ids 504,3575,282,4649,314 --max-tokens 32 --stop-ids 2
  fptq-run generate out.plan --ids 1,2 --temperature 0.8 --top-p 0.95 --seed 7 --save-outputs tokens.json
  fptq-run infer out.plan --load-inputs prefill/inputs.json --save-outputs engine.json

It ends with 0, or with 1 and the reason in one sentence.
)";

Arguments ArgumentsFrom(const std::vector<std::string>& words) {
  Arguments arguments;
  if (const char* library = std::getenv("FPTQ_TENSORRT_LIBRARY")) arguments.library = library;
  const std::map<std::string, Setter> setters = SettersOf(arguments);
  for (std::size_t at = 0; at < words.size(); ++at) {
    const std::string& word = words[at];
    if (word == "--help" || word == "-h") {
      arguments.verb = "help";
      return arguments;
    }
    if (word == "--cuda-graph") {
      arguments.request.cuda_graph = true;
    } else if (const auto setter = setters.find(word); setter != setters.end()) {
      if (at + 1 == words.size()) throw Error(word, "needs a value", kSeeHelp);
      setter->second(word, words[++at]);
    } else if (word.starts_with('-')) {
      throw Error(word, "is no option", kSeeHelp);
    } else if (arguments.verb.empty()) {
      arguments.verb = word;
    } else if (arguments.plan.empty()) {
      arguments.plan = word;
    } else {
      throw Error(word, "is one word too many", kSeeHelp);
    }
  }
  CheckComplete(arguments);
  return arguments;
}

}  // namespace fptq_run
