#include <string>
#include <vector>

#include "check.h"
#include "kernels/kernel_use.h"

namespace {

using namespace mlx_server;

TEST(a_disabled_kernel_gives_way_to_the_next_best) {
  CHECK(first_enabled({"use_best", "use_other"}) == "use_best");
  disable_kernel("use_best");
  CHECK(first_enabled({"use_best", "use_other"}) == "use_other");
  disable_kernel("use_other");
  CHECK(first_enabled({"use_best", "use_other"}).empty());
}

TEST(a_way_needs_all_its_kernels) {
  CHECK(are_enabled({"use_first", "use_second"}));
  disable_kernel("use_second");
  CHECK(!are_enabled({"use_first", "use_second"}));
  CHECK(are_enabled({"use_first"}));
}

TEST(launches_are_told_once) {
  take_launched_kernels();
  note_launch("b");
  note_launch("a");
  note_launch("b");
  CHECK(take_launched_kernels() == std::vector<std::string>({"a", "b"}));
  CHECK(take_launched_kernels().empty());
}

TEST(batches_may_matter_unless_it_is_forbidden) {
  CHECK(!is_batch_invariant());
  set_batch_invariant(true);
  CHECK(is_batch_invariant());
  set_batch_invariant(false);
  CHECK(!is_batch_invariant());
}

}  // namespace
