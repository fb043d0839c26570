// gated_delta's kernels for GPUs against the recurrence in double precision.
#include <algorithm>
#include <climits>
#include <vector>

#include "check.h"
#include "gated_delta_reference.h"
#include "kernels/host.h"

namespace {

using mlx_server::host_launch;
using mlx_server::HostBfloat16;

template <typename T, typename C, int KEY_HEADS, int KEY_DIM, int VALUE_HEADS, int VALUE_DIM, int TAPS, int THREADS>
void step_kernel(const T* qkv, const T* conv_weight, const T* a, const T* b, const T* a_log, const T* dt_bias,
                 const C* conv_state, const float* state, const int* slots, const int* rows, T* y, C* new_conv_state,
                 int* written, float* written_values) {
#include "gated_delta/gated_delta_step.kernel"
}

template <typename T, typename C, int KEY_HEADS, int KEY_DIM, int VALUE_HEADS, int VALUE_DIM, int TAPS, int THREADS>
void conv_kernel(const T* qkv, const T* conv_weight, const C* conv_state, const int* slots, const int* rows,
                 const int* chunks, float* mixed, C* new_conv_state) {
#include "gated_delta/gated_delta_conv.kernel"
}

template <typename T, int KEY_HEADS, int KEY_DIM, int VALUE_HEADS, int VALUE_DIM, int THREADS>
void chunk_kernel(const float* mixed, const T* a, const T* b, const T* a_log, const T* dt_bias, const int* chunks,
                  float* parts, float* added, float* decays) {
#include "gated_delta/gated_delta_chunk.kernel"
}

template <typename T, int KEY_DIM, int VALUE_HEADS, int VALUE_DIM, int THREADS>
void scan_kernel(const float* parts, const float* added, const float* decays, const float* state, const int* slots,
                 const int* rows, T* y, int* written, float* written_values) {
#include "gated_delta/gated_delta_scan.kernel"
}

constexpr int kChunk = 64;

// A batch, and room for what the kernels compute of it.
template <typename T>
struct Launch {
  Case<T> c;
  std::vector<T> y{}, conv{};  // conv: of all slots
  std::vector<float> state{}, written_values{};
  int written = -1;

  explicit Launch(Case<T> filled) : c(std::move(filled)), conv(c.conv_state), state(c.state) {
    y.resize(static_cast<std::size_t>(c.num_tokens() * c.value_heads * c.value_dim));
    written_values.resize(static_cast<std::size_t>(c.key_dim));
  }
};

// What the kernels are told of those rows of the batch that they compute: R rows in N chunks.
struct Rows {
  std::vector<int> places{}, rows{}, chunks{};  // [R], [R, 5], [N, 3]

  template <typename T>
  Rows(const Case<T>& c, int min_tokens, int max_tokens) {
    for (int row = 0, first = 0; row < static_cast<int>(c.query_lens.size()); first += c.query_lens[row++]) {
      const int n = c.query_lens[row], place = count();
      if (n < min_tokens || n > max_tokens) continue;
      places.push_back(row);
      rows.insert(rows.end(), {row, first, n, c.fresh[row], num_chunks()});
      for (int t = 0; t < n; t += kChunk) chunks.insert(chunks.end(), {place, first + t, std::min(n - t, kChunk)});
    }
  }

  int count() const { return static_cast<int>(places.size()); }
  int num_chunks() const { return static_cast<int>(chunks.size() / 3); }
};

// The rows' new values [R, size] into those of all slots.
template <typename T>
void write_conv(Launch<T>& run, const Rows& rows, const std::vector<T>& values) {
  const std::size_t size = run.conv.size() / kSlots;
  for (std::size_t i = 0; i < rows.places.size(); ++i) {
    const int slot = run.c.slots[static_cast<std::size_t>(rows.places[i])];
    std::copy_n(values.begin() + static_cast<long>(i * size), size, slot_of(run.conv, slot));
  }
}

template <typename T, int KEY_HEADS, int KEY_DIM, int VALUE_HEADS, int VALUE_DIM, int TAPS>
void run_steps(Launch<T>& run, int max_tokens) {
  constexpr int kThreads = 64, kValues = kThreads / 4;
  const Case<T>& c = run.c;
  const Rows rows(c, 1, max_tokens);
  std::vector<T> conv(c.conv_state.size() / kSlots * rows.places.size());
  host_launch({(VALUE_DIM + kValues - 1) / kValues, VALUE_HEADS, rows.count()}, kThreads, [&] {
    step_kernel<T, T, KEY_HEADS, KEY_DIM, VALUE_HEADS, VALUE_DIM, TAPS, kThreads>(
        c.qkv.data(), c.conv_weight.data(), c.a.data(), c.b.data(), c.a_log.data(), c.dt_bias.data(),
        c.conv_state.data(), run.state.data(), c.slots.data(), rows.rows.data(), run.y.data(), conv.data(),
        &run.written, run.written_values.data());
  });
  write_conv(run, rows, conv);
}

template <typename T, int KEY_HEADS, int KEY_DIM, int VALUE_HEADS, int VALUE_DIM, int TAPS>
void run_chunks(Launch<T>& run, int min_tokens) {
  constexpr int kThreads = 256, kValues = 32;
  const Case<T>& c = run.c;
  const Rows rows(c, min_tokens, INT_MAX);
  const std::size_t cells = static_cast<std::size_t>(rows.num_chunks() * VALUE_HEADS);
  std::vector<T> conv(c.conv_state.size() / kSlots * rows.places.size());
  std::vector<float> mixed(c.qkv.size()), parts(cells * (3 * KEY_DIM + kChunk) * kChunk),
      added(cells * kChunk * VALUE_DIM), decays(cells);
  host_launch({2 * KEY_HEADS + VALUE_HEADS, rows.num_chunks(), 1}, 64, [&] {
    conv_kernel<T, T, KEY_HEADS, KEY_DIM, VALUE_HEADS, VALUE_DIM, TAPS, 64>(
        c.qkv.data(), c.conv_weight.data(), c.conv_state.data(), c.slots.data(), rows.rows.data(), rows.chunks.data(),
        mixed.data(), conv.data());
  });
  host_launch({VALUE_HEADS, rows.num_chunks(), 1}, kThreads, [&] {
    chunk_kernel<T, KEY_HEADS, KEY_DIM, VALUE_HEADS, VALUE_DIM, kThreads>(
        mixed.data(), c.a.data(), c.b.data(), c.a_log.data(), c.dt_bias.data(), rows.chunks.data(), parts.data(),
        added.data(), decays.data());
  });
  host_launch({(VALUE_DIM + kValues - 1) / kValues, VALUE_HEADS, rows.count()}, kThreads, [&] {
    scan_kernel<T, KEY_DIM, VALUE_HEADS, VALUE_DIM, kThreads>(parts.data(), added.data(), decays.data(),
                                                              run.state.data(), c.slots.data(), rows.rows.data(),
                                                              run.y.data(), &run.written, run.written_values.data());
  });
  write_conv(run, rows, conv);
}

// written_row: that of the batch whose state the last kernel hands out a part of.
template <typename T>
void check(const Launch<T>& run, double tolerance, std::size_t written_row = 0) {
  const Result want = expected(run.c);
  check_near(run.y, want.y, tolerance);
  check_near(run.conv, want.conv_state, 0);
  check_near(run.state, want.state, 2e-5);
  CHECK(std::equal(run.written_values.begin(), run.written_values.end(),
                   run.state.begin() + run.written * run.c.key_dim));
  CHECK_EQ(run.written, run.c.slots[written_row] * run.c.value_heads * run.c.value_dim);
}

template <typename T, int kKeyHeads, int kKeyDim, int kValueHeads, int kValueDim, int kTaps>
Case<T> make_case(const std::vector<int>& query_lens, const std::vector<char>& fresh) {
  Case<T> c{query_lens, fresh, kKeyHeads, kValueHeads, kKeyDim, kValueDim, kTaps};
  c.fill();
  return c;
}

template <typename T, int... kSizes>
void check_steps(const Case<T>& c, double tolerance) {
  Launch<T> run(c);
  run_steps<T, kSizes...>(run, INT_MAX);
  check(run, tolerance);
}

template <typename T, int... kSizes>
void check_chunks(const Case<T>& c, double tolerance) {
  Launch<T> run(c);
  run_chunks<T, kSizes...>(run, 1);
  check(run, tolerance);
}

template <typename T, int... kSizes>
void check_steps(const std::vector<int>& query_lens, const std::vector<char>& fresh, double tolerance) {
  check_steps<T, kSizes...>(make_case<T, kSizes...>(query_lens, fresh), tolerance);
}

template <typename T, int... kSizes>
void check_chunks(const std::vector<int>& query_lens, const std::vector<char>& fresh, double tolerance) {
  check_chunks<T, kSizes...>(make_case<T, kSizes...>(query_lens, fresh), tolerance);
}

TEST(steps_agree_with_the_recurrence) {
  check_steps<float, 1, 32, 2, 32, 4>({1, 3, 2}, {0, 0, 1}, 2e-5);
  check_steps<float, 2, 6, 4, 20, 3>({9}, {0}, 2e-5);         // sizes that fill neither lanes nor groups
  check_steps<float, 1, 100, 1, 3, 2>({2, 1}, {0, 1}, 2e-5);  // more channels than threads
  check_steps<float, 2, 8, 8, 8, 4>({2}, {0}, 2e-5);
}

TEST(steps_with_bfloat16) { check_steps<HostBfloat16, 1, 16, 2, 16, 4>({1, 10}, {0, 1}, 8e-3); }

TEST(chunks_agree_with_the_recurrence) {
  check_chunks<float, 1, 32, 2, 32, 4>({9, 64}, {0, 1}, 2e-5);
  check_chunks<float, 1, 128, 1, 128, 4>({65}, {0}, 2e-5);
  check_chunks<float, 1, 16, 1, 4, 2>({130, 1}, {1, 0}, 2e-5);
  check_chunks<float, 1, 48, 1, 36, 3>({3, 63, 2}, {0, 0, 0}, 2e-5);  // sizes that fill neither slabs nor groups
  check_chunks<float, 2, 16, 8, 8, 4>({10}, {0}, 2e-5);
}

TEST(chunks_with_bfloat16) { check_chunks<HostBfloat16, 1, 16, 2, 16, 4>({1, 70}, {0, 1}, 8e-3); }

TEST(rows_of_few_tokens_and_of_many_in_one_batch) {
  Launch<float> run(make_case<float, 1, 16, 2, 8, 4>({20, 2, 66, 1}, {1, 0, 0, 1}));
  run_steps<float, 1, 16, 2, 8, 4>(run, 8);
  CHECK_EQ(run.written, run.c.slots[1] * 2 * 8);
  run_chunks<float, 1, 16, 2, 8, 4>(run, 9);
  check(run, 2e-5);
}

TEST(chunks_of_strong_decay_and_equal_keys) {
  check_chunks<float, 1, 32, 1, 32, 4>(forgetful(make_case<float, 1, 32, 1, 32, 4>({80}, {0})), 2e-5);
}

TEST(long_rows_without_decay) {
  check_steps<float, 1, 8, 1, 8, 4>(without_decay(make_case<float, 1, 8, 1, 8, 4>({80}, {0})), 2e-5);
  check_chunks<float, 1, 16, 1, 8, 4>(without_decay(make_case<float, 1, 16, 1, 8, 4>({300}, {0})), 2e-5);
}

}  // namespace
