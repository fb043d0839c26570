// gated_delta's kernels for CPUs against the recurrence in double precision.
#include <vector>

#include "check.h"
#include "gated_delta/gated_delta_cpu.h"
#include "gated_delta_reference.h"

namespace {

using mlx_server::GatedDelta;
using mlx_server::GatedDeltaKernel;
using mlx_server::ThreadPool;

Case<float> filled(Case<float> c) {
  c.fill();
  return c;
}

void check_cpu(const GatedDeltaKernel& kernel, Case<float> c) {
  const Result want = expected(c);
  ThreadPool pool(3);
  std::vector<float> y(want.y.size(), NAN), mixed(c.qkv.size(), NAN);
  mlx_server::gated_delta({.qkv = c.qkv.data(),
                           .conv_weight = c.conv_weight.data(),
                           .a = c.a.data(),
                           .b = c.b.data(),
                           .a_log = c.a_log.data(),
                           .dt_bias = c.dt_bias.data(),
                           .conv_state = c.conv_state.data(),
                           .state = c.state.data(),
                           .slots = c.slots.data(),
                           .mixed = mixed.data(),
                           .y = y.data(),
                           .query_lens = c.query_lens,
                           .fresh = c.fresh,
                           .taps = c.taps,
                           .num_key_heads = c.key_heads,
                           .num_value_heads = c.value_heads,
                           .key_dim = c.key_dim,
                           .value_dim = c.value_dim},
                          pool, kernel);
  check_near(y, want.y, 2e-5);
  check_near(c.conv_state, want.conv_state, 0);
  check_near(c.state, want.state, 2e-5);
}

TEST(cpu_kernels_agree_with_the_recurrence) {
  for (const GatedDeltaKernel* kernel : mlx_server::gated_delta_kernels()) {
    check_cpu(*kernel, filled({{1, 1, 1}, {0, 1, 0}, 2, 4, 16, 24, 4}));
    check_cpu(*kernel, filled({{9, 1, 64, 130}, {0, 0, 1, 0}, 1, 3, 32, 8, 2}));
    check_cpu(*kernel, filled({{65, 8}, {1, 0}, 2, 2, 8, 40, 5}));
    check_cpu(*kernel, filled({{100}, {0}, 1, 1, 128, 128, 4}));
    check_cpu(*kernel, filled({{3, 20}, {0, 1}, 2, 8, 8, 8, 4}));
    check_cpu(*kernel, forgetful(filled({{80}, {0}, 1, 1, 32, 32, 4})));
    check_cpu(*kernel, without_decay(filled({{2000}, {0}, 1, 1, 16, 8, 4})));
  }
}

}  // namespace
