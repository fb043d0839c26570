// The little that our C++ tests need of a framework: a failed check says where and what, and ends the program.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "%s:%d: CHECK(%s)\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                               \
    }                                                                             \
  } while (false)

#define CHECK_THROWS(statement, Exception)                                                              \
  do {                                                                                                  \
    bool thrown = false;                                                                                \
    try {                                                                                               \
      statement;                                                                                        \
    } catch (const Exception&) {                                                                        \
      thrown = true;                                                                                    \
    }                                                                                                   \
    if (!thrown) {                                                                                      \
      std::fprintf(stderr, "%s:%d: %s did not throw %s\n", __FILE__, __LINE__, #statement, #Exception); \
      std::exit(1);                                                                                     \
    }                                                                                                   \
  } while (false)
