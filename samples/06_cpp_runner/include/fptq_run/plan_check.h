// Will an engine load here: the file, what its run recorded of it, and what it needs of the machine.
//
// The same questions, in the same words, as `fptq-export doctor PLAN`.
#ifndef FPTQ_RUN_PLAN_CHECK_H
#define FPTQ_RUN_PLAN_CHECK_H

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fptq_run {

inline constexpr const char* kRtx = "tensorrt-rtx";
inline constexpr const char* kEnterprise = "tensorrt";

enum class Status : std::uint8_t { kOk, kNote, kProblem };

struct Check {
  std::string what;  // "file", "manifest", ...
  Status status = Status::kOk;
  std::string text;
  std::string next;  // how to mend it
};

struct PluginFacts {
  std::string version;  // of fptq-export
  std::int64_t layout_version = 0;
  bool embedded = false;  // in the plan
};

// What an engine was built for (`engine` in the build stage of manifest.json).
struct EngineFacts {
  std::string target;           // kRtx or kEnterprise
  std::string library_version;  // 1.7.1.116
  std::vector<std::string> compute_capabilities;
  std::int64_t plugin_layers = 0;
  std::optional<PluginFacts> plugin;

  [[nodiscard]] bool carries_plugin() const { return plugin && plugin->embedded; }
};

// What the file and its run say.
struct PlanReport {
  std::vector<Check> checks;
  std::optional<EngineFacts> facts;
};

// Looks at the file, its header, and the manifest.json and proof.json that name it. `run` is the run directory;
// empty looks beside the engine and in the folders there.
PlanReport ReportOnPlan(const std::string& plan, const std::string& run);

// A TensorRT library: kRtx or kEnterprise, and its version.
struct LibraryFacts {
  std::string path;
  std::string target;
  std::string version;
};

Check CheckLibrary(const EngineFacts& facts, const LibraryFacts& library);
// `library` is a file, kEmbedded, or empty where there is none; `info` is what the file's fptqPluginInfo says, empty
// where it has none.
Check CheckPlugin(const EngineFacts& facts, const std::string& library, const std::string& info);
Check CheckGpu(const EngineFacts& facts, const std::string& gpu, const std::string& compute_capability);

// --plugin embedded: the library is in the plan (`plugins_to_serialize`). Plans whose manifest says so need no option.
inline constexpr const char* kEmbedded = "embedded";

// Throws Error for a check that is a problem.
void Require(const std::string& plan, const Check& check);

}  // namespace fptq_run

#endif  // FPTQ_RUN_PLAN_CHECK_H
