#include "fptq_run/plan_check.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>

#include "fptq_run/error.h"
#include "json.h"
#include "plan_header.h"
#include "sha256.h"

namespace fptq_run {
namespace {

namespace fs = std::filesystem;

constexpr const char* kManifest = "manifest.json";
constexpr const char* kProof = "proof.json";
constexpr const char* kBuildAgain = "build it again: fptq-export build DIR --engine FILE";
constexpr const char* kCopyAgain = "copy it again, or build it again: fptq-export build DIR --engine FILE";
constexpr std::size_t kShownDigits = 12;

// A manifest that names the engine.
struct Run {
  fs::path directory;
  Json build;          // its build stage
  std::string sha256;  // of the engine, as recorded
};

Check FileCheck(const std::string& plan, const std::optional<PlanHeader>& header) {
  if (!fs::is_regular_file(plan)) {
    const char* kind = fs::is_directory(plan) ? "is a directory" : "no such file";
    return {"file", Status::kProblem, kind, "give the engine's file"};
  }
  const std::uint64_t size = fs::file_size(plan);
  if (!header) {
    if (const auto instead = WhatInstead(plan)) {
      return {"file", Status::kProblem, "it is not an engine: it is " + *instead, kCopyAgain};
    }
    return {"file", Status::kOk, std::to_string(size) + " bytes", ""};
  }
  if (size != header->file_bytes) {
    return {"file", Status::kProblem,
            std::string("it is ") + (size < header->file_bytes ? "truncated" : "longer than it should be") +
                ": " + std::to_string(size) + " bytes, its header says " + std::to_string(header->file_bytes),
            kCopyAgain};
  }
  return {"file", Status::kOk,
          "an engine of TensorRT for RTX " + header->library_version + ", complete: " + std::to_string(size) +
              " bytes",
          ""};
}

// Directories that may have the engine's manifest.
std::vector<fs::path> Places(const std::string& plan, const std::string& run) {
  if (!run.empty()) return {run};
  const fs::path parent = fs::absolute(plan).parent_path();
  std::set<fs::path> inside;
  for (const fs::directory_entry& entry : fs::directory_iterator(parent)) {
    if (fs::is_regular_file(entry.path() / kManifest)) inside.insert(entry.path());
  }
  std::vector<fs::path> places(inside.begin(), inside.end());
  if (fs::is_regular_file(parent / kManifest)) places.insert(places.begin(), parent);
  return places;
}

Json JsonFromFile(const fs::path& path) {
  std::ifstream file(path);
  if (!file) throw Error(path.string(), "cannot be opened", "give the run directory with --run");
  try {
    return Json::parse(file);
  } catch (const Json::exception&) {
    throw Error(path.string(), "is no JSON: it is damaged", kBuildAgain);
  }
}

// The run whose manifest records the engine's hash, else its name.
std::optional<Run> RunOfEngine(const std::string& plan, const std::string& directory,
                               const std::string& sha256) {
  std::optional<Run> named;
  for (const fs::path& place : Places(plan, directory)) {
    const Json manifest = JsonFromFile(place / kManifest);
    const Json build = manifest.value(Json::json_pointer("/stages/build"), Json());
    if (!build.is_object()) continue;
    for (const Json& output : build.at("outputs")) {
      const fs::path path = output.at("path").get<std::string>();
      Run run{place, build, output.at("sha256").get<std::string>()};
      if (run.sha256 == sha256) return run;
      if (path.filename() == fs::path(plan).filename()) named = run;
    }
  }
  if (!named && !directory.empty()) {
    throw Error(directory, std::string("has no ") + kManifest + " that names this engine",
                "give the run directory");
  }
  return named;
}

EngineFacts FactsFromJson(const Json& engine) {
  EngineFacts facts{engine.at("target").get<std::string>(), engine.at("library_version").get<std::string>(),
                    engine.value("compute_capabilities", std::vector<std::string>()),
                    engine.value("plugin_layers", std::int64_t{0}), std::nullopt};
  const Json plugin = engine.value("plugin", Json());
  if (plugin.is_object()) {
    facts.plugin =
        PluginFacts{plugin.at("version").get<std::string>(), plugin.at("layout_version").get<std::int64_t>(),
                    plugin.value("embedded", false)};
  }
  return facts;
}

// Figures of the build; manifests of before there were facts have some of them.
Json EngineOf(const Run& run) {
  const Json& summary = run.build.at("summary");
  return summary.contains("engine") ? summary.at("engine") : summary;
}

Check SameFileCheck(const Run& run, const std::string& sha256) {
  if (run.sha256 == sha256) {
    return {"manifest", Status::kOk,
            run.directory.string() + ": the engine is the one that was recorded (SHA-256)", ""};
  }
  return {"manifest", Status::kProblem,
          "the engine is not the one that " + run.directory.string() + " recorded: its SHA-256 is " +
              sha256.substr(0, kShownDigits) + "..., not " + run.sha256.substr(0, kShownDigits) +
              "...; one of the two was changed",
          kCopyAgain};
}

Check ProofCheck(const Run& run) {
  const fs::path path = run.directory / kProof;
  const Json& outputs = run.build.at("outputs");
  const auto record = std::find_if(outputs.begin(), outputs.end(),
                                   [](const Json& file) { return file.at("path") == kProof; });
  if (record == outputs.end()) {
    return {"proof", Status::kNote, "the engine was built before this tool wrote proofs", ""};
  }
  if (!fs::is_regular_file(path)) {
    return {"proof", Status::kNote, path.string() + " is not here, so it was not looked at", ""};
  }
  if (Sha256FromFile(path.string()) != record->at("sha256").get<std::string>()) {
    return {"proof", Status::kProblem,
            path.string() + " is not the one that was recorded: it or the manifest was changed", kBuildAgain};
  }
  const Json proof = JsonFromFile(path);
  if (proof.at("engine") != EngineOf(run)) {
    return {"proof", Status::kProblem, "the manifest was changed: its engine is not that of proof.json",
            kBuildAgain};
  }
  const Json& layers = proof.at("layers");
  const auto proven = std::count_if(layers.begin(), layers.end(),
                                    [](const Json& layer) { return layer.at("verdict") == "proven"; });
  return {"proof", Status::kOk,
          std::to_string(proven) + " of " + std::to_string(layers.size()) + " layers proven", ""};
}

Check CheckEmbedded(const std::string& needs, const std::string& library) {
  if (library.empty() || library == kEmbedded) {
    return {"plugin", Status::kOk, needs + ", which the engine carries", ""};
  }
  return {"plugin", Status::kProblem, needs + ", which the engine carries: " + library + " would not be used",
          "leave --plugin out"};
}

void AddRun(const std::string& plan, const std::string& directory, const std::optional<PlanHeader>& header,
            PlanReport& report) {
  const std::string sha256 = Sha256FromFile(plan);
  const std::optional<Run> run = RunOfEngine(plan, directory, sha256);
  if (!run) {
    report.checks.push_back(
        {"manifest", Status::kNote, "none beside it names this engine", "give its run directory with --run"});
    return;
  }
  report.checks.push_back(SameFileCheck(*run, sha256));
  report.facts = FactsFromJson(EngineOf(*run));
  if (header && header->library_version != report.facts->library_version) {
    report.checks.push_back({"manifest", Status::kProblem,
                             "it says that " + report.facts->library_version +
                                 " built the engine, whose header says " + header->library_version +
                                 ": the manifest was changed",
                             kBuildAgain});
  }
  report.checks.push_back(ProofCheck(*run));
}

}  // namespace

PlanReport ReportOnPlan(const std::string& plan, const std::string& run) {
  PlanReport report;
  const std::optional<PlanHeader> header = HeaderFromFile(plan);
  report.checks.push_back(FileCheck(plan, header));
  if (report.checks.back().status == Status::kProblem) return report;
  try {
    AddRun(plan, run, header, report);
  } catch (const Json::exception&) {
    report.checks.push_back({"manifest", Status::kProblem,
                             "its figures of the build are not such as fptq-export writes: it was changed",
                             kBuildAgain});
  }
  if (!report.facts && header) report.facts = EngineFacts{kRtx, header->library_version, {}, 0, std::nullopt};
  return report;
}

Check CheckLibrary(const EngineFacts& facts, const LibraryFacts& library) {
  const std::string needs = facts.target + " " + facts.library_version;
  if (facts.target != kRtx && facts.target != kEnterprise) {
    return {"library", Status::kProblem,
            "the manifest names the target '" + facts.target + "', which there is not: it was changed",
            kBuildAgain};
  }
  if (library.target != facts.target) {
    return {"library", Status::kProblem,
            "it needs " + needs + "; " + library.path + " is " + library.target + " " + library.version +
                ", which does not load it",
            "give that library with --library"};
  }
  if (library.version != facts.library_version) {
    return {"library", Status::kProblem,
            needs + " built it, and " + library.path + " is " + library.version +
                ": only the version that built an engine is sure to load it",
            "install " + facts.library_version + ", or build it again with the version that is here"};
  }
  return {"library", Status::kOk, needs + " is " + library.path, ""};
}

Check CheckPlugin(const EngineFacts& facts, const std::string& library, const std::string& info) {
  if (facts.plugin_layers == 0) return {"plugin", Status::kOk, "no layer is recorded to need it", ""};
  const std::string needs = std::to_string(facts.plugin_layers) + " of its layers run in the plugin";
  if (facts.plugin && facts.plugin->embedded)
    return CheckEmbedded(needs + ", version " + facts.plugin->version, library);
  if (library.empty()) {
    return {
        "plugin", Status::kProblem, needs + ", which is missing",
        "give --plugin libfptq_trt.so (python -m fptq_export.plugin build), or build it with --embed-plugin"};
  }
  if (library == kEmbedded) {
    if (!facts.plugin)
      return {"plugin", Status::kNote, needs + "; whether it carries it is not recorded", ""};
    return {"plugin", Status::kProblem, needs + ", which it does not carry",
            "give --plugin libfptq_trt.so, or build it again with --embed-plugin"};
  }
  const Json found = Json::parse(info, nullptr, false);
  if (!found.is_object() || !found.contains("version") || !found.contains("layout_version")) {
    return {"plugin", Status::kProblem, library + " is not a plugin library of fptq-export",
            "build it: python -m fptq_export.plugin build"};
  }
  const PluginFacts here{found["version"].get<std::string>(), found["layout_version"].get<std::int64_t>(),
                         false};
  if (!facts.plugin) {
    return {"plugin", Status::kNote, needs + "; which version of it built the engine is not recorded", ""};
  }
  const auto text = [](const PluginFacts& plugin) {
    return "version " + plugin.version + " (packed layout " + std::to_string(plugin.layout_version) + ")";
  };
  if (here.version != facts.plugin->version || here.layout_version != facts.plugin->layout_version) {
    return {"plugin", Status::kProblem, needs + ", " + text(*facts.plugin) + "; here is " + text(here),
            "build the plugin of fptq-export " + facts.plugin->version + ", or the engine again"};
  }
  return {"plugin", Status::kOk, needs + ", version " + here.version + ", which is here", ""};
}

Check CheckGpu(const EngineFacts& facts, const std::string& gpu, const std::string& compute_capability) {
  const std::vector<std::string>& fitting = facts.compute_capabilities;
  const std::string here = gpu + " (" + compute_capability + ")";
  std::string built_for;
  for (const std::string& number : fitting) built_for += (built_for.empty() ? "" : ", ") + number;
  if (fitting.empty())
    return {"GPU", Status::kNote, "nothing says which GPU it was built for; here is " + here, ""};
  if (std::find(fitting.begin(), fitting.end(), compute_capability) == fitting.end()) {
    return {"GPU", Status::kProblem,
            "it was built for compute capability " + built_for + ", and here is " + here,
            "build it for that GPU: fptq-export build DIR --engine FILE --compute-capability " +
                compute_capability};
  }
  return {"GPU", Status::kOk, "built for " + built_for + "; here is " + here, ""};
}

void Require(const std::string& plan, const Check& check) {
  if (check.status == Status::kProblem) throw Error(plan, check.text, check.next);
}

}  // namespace fptq_run
