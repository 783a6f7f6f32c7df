// The command fptq-run, on whatever machine it is given.
#ifndef FPTQ_RUN_COMMAND_H
#define FPTQ_RUN_COMMAND_H

#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "fptq_run/device.h"
#include "fptq_run/engine.h"
#include "fptq_run/plan_check.h"

namespace fptq_run {

// What is opened at run time. Everything throws Error.
class Machine {
 public:
  Machine() = default;
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;
  virtual ~Machine() = default;

  // Of a target; `path` is a library file, or empty.
  virtual LibraryFacts OpenLibrary(const std::string& target, const std::string& path) = 0;
  // What fptqPluginInfo of a plugin library says; empty where it has none.
  virtual std::string PluginInfo(const std::string& path) = 0;
  virtual std::unique_ptr<Device> OpenDevice() = 0;
  // In the library that was opened, on the device that was. `plugin` is a library file, kEmbedded or empty.
  virtual std::unique_ptr<Engine> OpenEngine(const std::string& plan, const std::string& plugin,
                                             Device& device) = 0;
};

// TensorRT and the GPU that are here.
std::unique_ptr<Machine> MachineOfHere();

// Exit code: 0, or 1 with the reason on `err`.
int RunCommand(const std::vector<std::string>& words, Machine& machine, std::ostream& out, std::ostream& err);

}  // namespace fptq_run

#endif  // FPTQ_RUN_COMMAND_H
