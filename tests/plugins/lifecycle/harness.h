// A test harness in a page: TEST registers a function, EXPECT and EXPECT_EQ record failures, RunTests runs
// all.
#ifndef FPTQ_TESTS_HARNESS_H
#define FPTQ_TESTS_HARNESS_H

#include <cstdio>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

namespace harness {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& Tests() {
  static std::vector<Test> tests;
  return tests;
}

inline int& Failures() {
  static int failures = 0;
  return failures;
}

struct Registration {
  Registration(const char* name, void (*run)()) { Tests().push_back({name, run}); }
};

inline void Fail(const char* file, int line, const std::string& text) {
  ++Failures();
  std::printf("%s:%d: %s\n", file, line, text.c_str());
}

template <typename A, typename B>
void ExpectEqual(const A& found, const B& expected, const char* text, const char* file, int line) {
  if (found == expected) return;
  std::ostringstream message;
  message << text << " is " << found << ", expected " << expected;
  Fail(file, line, message.str());
}

// Runs the tests whose name contains `filter`; the exit code of the process.
inline int RunTests(const char* filter) {
  int failed = 0, ran = 0;
  for (const Test& test : Tests()) {
    if (std::strstr(test.name, filter) == nullptr) continue;
    const int before = Failures();
    test.run();
    ++ran;
    failed += Failures() != before;
    std::printf("%s %s\n", Failures() == before ? "ok    " : "FAILED", test.name);
  }
  std::printf("%d of %d tests failed\n", failed, ran);
  return failed != 0 || ran == 0;
}

}  // namespace harness

#define TEST(name)                                              \
  static void name();                                           \
  static const harness::Registration name##_entry(#name, name); \
  static void name()
#define EXPECT(condition) \
  if (!(condition)) harness::Fail(__FILE__, __LINE__, "not true: " #condition)
#define EXPECT_EQ(found, expected) harness::ExpectEqual(found, expected, #found, __FILE__, __LINE__)

#endif  // FPTQ_TESTS_HARNESS_H
