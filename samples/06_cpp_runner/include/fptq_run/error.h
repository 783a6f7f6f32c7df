// What the person at the keyboard can mend: where, what is wrong, and the next step.
#ifndef FPTQ_RUN_ERROR_H
#define FPTQ_RUN_ERROR_H

#include <stdexcept>
#include <string>

namespace fptq_run {

// The command prints `where: cause`, below it the next step, and ends with 1.
class Error : public std::runtime_error {
 public:
  Error(const std::string& where, const std::string& cause, const std::string& next = "")
      : std::runtime_error(where + ": " + cause + (next.empty() ? "" : "\n  -> " + next)) {}
};

}  // namespace fptq_run

#endif  // FPTQ_RUN_ERROR_H
