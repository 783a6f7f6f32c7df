// The command line.
#ifndef FPTQ_RUN_SRC_ARGUMENTS_H
#define FPTQ_RUN_SRC_ARGUMENTS_H

#include <string>
#include <vector>

#include "fptq_run/generator.h"

namespace fptq_run {

struct Arguments {
  std::string verb;  // check, infer, generate; help
  std::string plan;
  std::string run;
  std::string library;
  std::string plugin;
  std::string load_inputs;
  std::string save_outputs;
  std::vector<TokenIds> prompts;
  Request request;
};

extern const char* const kHelp;

// Throws Error where the words make no command.
Arguments ArgumentsFrom(const std::vector<std::string>& words);

}  // namespace fptq_run

#endif  // FPTQ_RUN_SRC_ARGUMENTS_H
