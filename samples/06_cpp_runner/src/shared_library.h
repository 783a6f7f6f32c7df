// A library that is opened at run time.
#ifndef FPTQ_RUN_SRC_SHARED_LIBRARY_H
#define FPTQ_RUN_SRC_SHARED_LIBRARY_H

#include <dlfcn.h>

#include <string>
#include <utility>
#include <vector>

#include "fptq_run/error.h"

namespace fptq_run {

class SharedLibrary {
 public:
  // Opens the first of some names that the loader finds. Throws Error with the loader's words about the last.
  SharedLibrary(const std::vector<std::string>& names, const std::string& next) {
    std::string cause = "no name was given";
    for (const std::string& name : names) {
      path_ = name;
      handle_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (handle_ != nullptr) return;
      const char* text = dlerror();
      cause = text == nullptr ? "the loader says no reason" : text;
    }
    throw Error(path_, "cannot be loaded (" + cause + ")", next);
  }
  SharedLibrary(SharedLibrary&& other) noexcept
      : path_(std::move(other.path_)), handle_(std::exchange(other.handle_, nullptr)) {}
  SharedLibrary(const SharedLibrary&) = delete;
  SharedLibrary& operator=(const SharedLibrary&) = delete;
  SharedLibrary& operator=(SharedLibrary&&) = delete;
  ~SharedLibrary() {
    if (handle_ != nullptr) dlclose(handle_);
  }

  // Null where the library has no such function.
  template <typename Function>
  [[nodiscard]] Function* Find(const char* name) const {
    return reinterpret_cast<Function*>(dlsym(handle_, name));
  }

  // Throws Error where the library has no such function.
  template <typename Function>
  [[nodiscard]] Function* Get(const char* name) const {
    auto* function = Find<Function>(name);
    if (function == nullptr)
      throw Error(path_, std::string("has no function ") + name, "install a newer one");
    return function;
  }

  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
  void* handle_ = nullptr;
};

}  // namespace fptq_run

#endif  // FPTQ_RUN_SRC_SHARED_LIBRARY_H
