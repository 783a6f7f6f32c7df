// Messages of the plugin: one line each on standard error, prefixed "[fptq]".
//
// TensorRT's ILogger is not used: its virtual table changed between TensorRT 10 and 11, and one library
// serves both.
#ifndef FPTQ_SRC_LOG_H
#define FPTQ_SRC_LOG_H

#include <cstdio>

namespace fptq {

// Writes one line, in one call, so that lines of several threads do not mix. Never fails, never allocates.
template <typename... Args>
void LogError(const char* format, Args... args) noexcept {
  char text[512];
  if constexpr (sizeof...(args) == 0) {
    std::snprintf(text, sizeof(text), "%s", format);
  } else {
    std::snprintf(text, sizeof(text), format, args...);
  }
  std::fprintf(stderr, "[fptq] %s\n", text);
}

}  // namespace fptq

#endif  // FPTQ_SRC_LOG_H
