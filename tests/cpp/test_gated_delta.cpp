// gated_delta's kernels for CPUs and for GPUs against the recurrence in double precision.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "gated_delta/gated_delta_cpu.h"
#include "kernels/host.h"

namespace {

using mlx_server::GatedDelta;
using mlx_server::GatedDeltaKernel;
using mlx_server::HostBfloat16;
using mlx_server::ThreadPool;

constexpr int kSlots = 5;

template <typename T>
std::vector<T> random(int size, float spread) {
  std::mt19937 rng(static_cast<unsigned>(size));
  std::normal_distribution<float> normal(0, spread);
  std::vector<T> values(static_cast<std::size_t>(size));
  for (T& v : values) {
    v = T(normal(rng));
  }
  return values;
}

// T is the dtype of everything but the state.
template <typename T>
struct Case {
  std::vector<int> query_lens;
  std::vector<char> fresh;
  int key_heads, value_heads, key_dim, value_dim, taps;
  std::vector<std::int32_t> slots{};
  std::vector<T> qkv{}, conv_weight{}, a{}, b{}, a_log{}, dt_bias{}, conv_state{};
  std::vector<float> state{};

  int channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
  int num_tokens() const {
    int sum = 0;
    for (const int n : query_lens) sum += n;
    return sum;
  }

  void fill() {
    const int tokens = num_tokens();
    qkv = random<T>(tokens * channels(), 1);
    conv_weight = random<T>(channels() * taps, 0.5f);
    a = random<T>(tokens * value_heads, 2);
    b = random<T>(tokens * value_heads + 1, 1);
    a_log = random<T>(value_heads, 1);
    dt_bias = random<T>(value_heads + 1, 1);
    conv_state = random<T>(kSlots * (taps - 1) * channels(), 1);
    state = random<float>(kSlots * value_heads * value_dim * key_dim, 0.3f);
    for (std::size_t i = 0; i < query_lens.size(); ++i) {
      slots.push_back(static_cast<std::int32_t>((i * 2 + 1) % kSlots));
    }
  }
};

struct Result {
  std::vector<double> y, conv_state, state;
};

double silu(double x) { return x / (1 + std::exp(-x)); }

void scale_to(double* x, int d, double length) {
  double squares = 1e-6;
  for (int i = 0; i < d; ++i) squares += x[i] * x[i];
  for (int i = 0; i < d; ++i) x[i] *= length / std::sqrt(squares);
}

template <typename T>
void expected_token(const Case<T>& c, int token, int slot, Result& r) {
  const int channels = c.channels(), history = c.taps - 1;
  double* const old = r.conv_state.data() + slot * history * channels;
  std::vector<double> mixed(static_cast<std::size_t>(channels));
  for (int i = 0; i < channels; ++i) {
    double sum = double{float(c.qkv[token * channels + i])} * float(c.conv_weight[i * c.taps + history]);
    for (int tap = 0; tap < history; ++tap) sum += old[tap * channels + i] * float(c.conv_weight[i * c.taps + tap]);
    mixed[i] = silu(sum);
  }
  std::copy(old + channels, old + history * channels, old);
  for (int i = 0; i < channels; ++i) old[(history - 1) * channels + i] = float(c.qkv[token * channels + i]);
  for (int h = 0; h < 2 * c.key_heads; ++h) {
    scale_to(mixed.data() + h * c.key_dim, c.key_dim, h < c.key_heads ? 1 / std::sqrt(double(c.key_dim)) : 1.0);
  }
  for (int h = 0; h < c.value_heads; ++h) {
    const double* const q = mixed.data() + h / (c.value_heads / c.key_heads) * c.key_dim;
    const double* const k = q + c.key_heads * c.key_dim;
    const double x = double{float(c.a[token * c.value_heads + h])} + float(c.dt_bias[h]);
    const double decay = std::exp(-std::exp(double{float(c.a_log[h])}) * std::log1p(std::exp(x)));
    const double beta = 1 / (1 + std::exp(-double{float(c.b[token * c.value_heads + h])}));
    for (int v = 0; v < c.value_dim; ++v) {
      double* const s = r.state.data() + ((slot * c.value_heads + h) * c.value_dim + v) * c.key_dim;
      double sk = 0, sq = 0;
      for (int d = 0; d < c.key_dim; ++d) sk += (s[d] *= decay) * k[d];
      const double delta = beta * (mixed[2 * c.key_heads * c.key_dim + h * c.value_dim + v] - sk);
      for (int d = 0; d < c.key_dim; ++d) sq += (s[d] += delta * k[d]) * q[d];
      r.y.push_back(sq);
    }
  }
}

template <typename T>
Result expected(const Case<T>& c) {
  Result r{{}, {}, {c.state.begin(), c.state.end()}};
  for (const T& x : c.conv_state) r.conv_state.push_back(float(x));
  int token = 0;
  for (std::size_t row = 0; row < c.query_lens.size(); ++row) {
    const std::size_t conv_size = r.conv_state.size() / kSlots, state_size = r.state.size() / kSlots;
    if (c.fresh[row]) {
      std::fill_n(r.conv_state.begin() + static_cast<long>(c.slots[row] * conv_size), conv_size, 0.0);
      std::fill_n(r.state.begin() + static_cast<long>(c.slots[row] * state_size), state_size, 0.0);
    }
    for (int t = 0; t < c.query_lens[row]; ++t) expected_token(c, token++, c.slots[row], r);
  }
  return r;
}

template <typename T>
void check_near(const std::vector<T>& got, const std::vector<double>& want, double tolerance) {
  CHECK_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < want.size(); ++i) {
    CHECK_NEAR(float(got[i]), want[i], tolerance * (1 + std::abs(want[i])));
  }
}

void check_cpu(const GatedDeltaKernel& kernel, Case<float> c) {
  c.fill();
  const Result want = expected(c);
  ThreadPool pool(3);
  std::vector<float> y(want.y.size()), mixed(c.qkv.size());
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
    check_cpu(*kernel, {{1, 1, 1}, {0, 1, 0}, 2, 4, 16, 24, 4});
    check_cpu(*kernel, {{9, 1, 64, 130}, {0, 0, 1, 0}, 1, 3, 32, 8, 2});
    check_cpu(*kernel, {{65, 8}, {1, 0}, 2, 2, 8, 40, 5});
    check_cpu(*kernel, {{100}, {0}, 1, 1, 128, 128, 4});
  }
}

template <typename T, int KEY_HEADS, int KEY_DIM, int VALUE_HEADS, int VALUE_DIM, int TAPS, int THREADS>
void conv_kernel(const T* qkv, const T* conv_weight, const T* conv_state, const int* slots, const int* rows,
                 float* mixed, T* new_conv_state) {
#include "gated_delta/gated_delta_conv.kernel"
}

template <typename T, int KEY_HEADS, int KEY_DIM, int VALUE_HEADS, int VALUE_DIM, int THREADS>
void scan_kernel(const float* mixed, const T* a, const T* b, const T* a_log, const T* dt_bias, const float* state,
                 const int* slots, const int* rows, T* y, float* new_state) {
#include "gated_delta/gated_delta_scan.kernel"
}

// Values [B, size] of the batch's rows into a copy of all slots' values.
template <typename T>
std::vector<T> with_rows(std::vector<T> slots_values, const std::vector<T>& rows, const std::vector<int>& slots) {
  const std::size_t size = slots_values.size() / kSlots;
  for (std::size_t row = 0; row < slots.size(); ++row) {
    std::copy_n(rows.begin() + static_cast<long>(row * size), size,
                slots_values.begin() + static_cast<long>(slots[row] * size));
  }
  return slots_values;
}

template <typename T, int KEY_HEADS, int KEY_DIM, int VALUE_HEADS, int VALUE_DIM, int TAPS>
void check_gpu(std::vector<int> query_lens, std::vector<char> fresh, double tolerance) {
  constexpr int kThreads = 64;
  Case<T> c{query_lens, fresh, KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, TAPS};
  c.fill();
  const int num_rows = static_cast<int>(query_lens.size());
  std::vector<int> rows;
  for (int row = 0, token = 0; row < num_rows; token += query_lens[row++]) {
    for (int value : {token, query_lens[row], int{fresh[row]}}) rows.push_back(value);
  }
  std::vector<float> mixed(c.qkv.size()), state(c.state.size() / kSlots * query_lens.size());
  std::vector<T> conv(c.conv_state.size() / kSlots * query_lens.size());
  std::vector<T> y(static_cast<std::size_t>(c.num_tokens() * VALUE_HEADS * VALUE_DIM));
  mlx_server::host_launch({2 * KEY_HEADS + VALUE_HEADS, c.num_tokens(), 1}, kThreads, [&] {
    conv_kernel<T, KEY_HEADS, KEY_DIM, VALUE_HEADS, VALUE_DIM, TAPS, kThreads>(c.qkv.data(), c.conv_weight.data(),
                                                                               c.conv_state.data(), c.slots.data(),
                                                                               rows.data(), mixed.data(), conv.data());
  });
  constexpr int kValues = kThreads / 4;
  mlx_server::host_launch({(VALUE_DIM + kValues - 1) / kValues, VALUE_HEADS, num_rows}, kThreads, [&] {
    scan_kernel<T, KEY_HEADS, KEY_DIM, VALUE_HEADS, VALUE_DIM, kThreads>(
        mixed.data(), c.a.data(), c.b.data(), c.a_log.data(), c.dt_bias.data(), c.state.data(), c.slots.data(),
        rows.data(), y.data(), state.data());
  });
  const Result want = expected(c);
  check_near(y, want.y, tolerance);
  check_near(with_rows(c.conv_state, conv, c.slots), want.conv_state, 0);
  check_near(with_rows(c.state, state, c.slots), want.state, 2e-5);
}

TEST(gpu_kernels_agree_with_the_recurrence) {
  check_gpu<float, 1, 32, 2, 32, 4>({1, 11, 2}, {0, 0, 1}, 2e-5);
  check_gpu<float, 2, 6, 2, 20, 3>({9}, {0}, 2e-5);         // sizes that fill neither lanes nor groups
  check_gpu<float, 1, 100, 1, 3, 2>({2, 1}, {0, 1}, 2e-5);  // heads of more channels than threads
}

TEST(gpu_kernels_with_bfloat16) { check_gpu<HostBfloat16, 1, 16, 2, 16, 4>({1, 10}, {0, 1}, 8e-3); }

}  // namespace
