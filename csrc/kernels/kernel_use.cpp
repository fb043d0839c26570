#include "kernels/kernel_use.h"

#include <algorithm>
#include <functional>
#include <set>

namespace mlx_server {

namespace {

using Names = std::set<std::string, std::less<>>;

Names& disabled() {
  static Names names;
  return names;
}

Names& launched() {
  static Names names;
  return names;
}

bool batch_invariant = false;

}  // namespace

void disable_kernel(const std::string& name) { disabled().insert(name); }

bool are_enabled(std::initializer_list<std::string_view> names) {
  return std::ranges::none_of(names, [](std::string_view name) { return disabled().contains(name); });
}

std::string_view first_enabled(std::initializer_list<std::string_view> names) {
  const auto* const found = std::ranges::find_if(names, [](std::string_view name) { return are_enabled({name}); });
  return found == names.end() ? std::string_view() : *found;
}

void set_batch_invariant(bool wanted) { batch_invariant = wanted; }

bool is_batch_invariant() { return batch_invariant; }

void note_launch(std::string_view name) {
  if (!launched().contains(name)) {
    launched().emplace(name);
  }
}

std::vector<std::string> take_launched_kernels() {
  std::vector<std::string> names(launched().begin(), launched().end());
  launched().clear();
  return names;
}

}  // namespace mlx_server
