// The whole test framework: `TEST(name) { CHECK(...); }` in a test_*.cpp that includes this header once becomes a
// program that runs its tests in order, or only those whose name contains its first argument, and exits 1 if a check
// failed.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <iostream>
#include <vector>

namespace mlx_server::testing {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int num_failed_checks = 0;

inline bool add(const char* name, void (*run)()) {
  tests().push_back({name, run});
  return true;
}

inline std::ostream& fail(const char* file, int line) {
  ++num_failed_checks;
  return std::cerr << "  " << file << ":" << line << ": ";
}

inline bool is_near(double a, double b, double tolerance) { return a == b || std::abs(a - b) <= tolerance; }

}  // namespace mlx_server::testing

#define TEST(name)                                                                                \
  static void test_##name();                                                                      \
  [[maybe_unused]] static const bool added_##name = mlx_server::testing::add(#name, test_##name); \
  static void test_##name()

#define CHECK(...)                                                                                       \
  do {                                                                                                   \
    if (!(__VA_ARGS__)) mlx_server::testing::fail(__FILE__, __LINE__) << "CHECK(" << #__VA_ARGS__ ")\n"; \
  } while (false)

#define CHECK_EQ(a, b)                                                                                             \
  do {                                                                                                             \
    const auto& check_a = (a);                                                                                     \
    const auto& check_b = (b);                                                                                     \
    if (!(check_a == check_b))                                                                                     \
      mlx_server::testing::fail(__FILE__, __LINE__) << #a " == " #b ": " << check_a << " and " << check_b << "\n"; \
  } while (false)

#define CHECK_NEAR(a, b, tolerance)                                                                            \
  do {                                                                                                         \
    const double check_a = (a);                                                                                \
    const double check_b = (b);                                                                                \
    if (!mlx_server::testing::is_near(check_a, check_b, (tolerance)))                                          \
      mlx_server::testing::fail(__FILE__, __LINE__)                                                            \
          << #a " is near " #b ": " << check_a << " and " << check_b << ", tolerance " << (tolerance) << "\n"; \
  } while (false)

#define CHECK_THROWS(statement, Exception)                                                                            \
  do {                                                                                                                \
    bool check_thrown = false;                                                                                        \
    try {                                                                                                             \
      statement;                                                                                                      \
    } catch (const Exception&) {                                                                                      \
      check_thrown = true;                                                                                            \
    }                                                                                                                 \
    if (!check_thrown) mlx_server::testing::fail(__FILE__, __LINE__) << #statement " did not throw " #Exception "\n"; \
  } while (false)

int main(int argc, char** argv) {
  using namespace mlx_server::testing;
  int num_run = 0;
  for (const Test& test : tests()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    ++num_run;
    std::cerr << test.name << "\n";
    try {
      test.run();
    } catch (const std::exception& error) {
      fail(__FILE__, __LINE__) << test.name << " threw: " << error.what() << "\n";
    }
  }
  std::cerr << num_run << " tests, " << num_failed_checks << " failed checks\n";
  return num_failed_checks != 0 || num_run == 0;
}
