// Errors of ops: a caller's mistake is named with the op, what it must be and what it is.
#pragma once

#include <sstream>
#include <stdexcept>

namespace mlx_server {

// Throws std::invalid_argument (Python's ValueError) with the message "[op] <args>.".
template <typename... Args>
[[noreturn]] void op_error(const char* op, const Args&... args) {
  std::ostringstream message;
  message << "[" << op << "] ";
  (message << ... << args);
  message << ".";
  throw std::invalid_argument(message.str());
}

}  // namespace mlx_server
