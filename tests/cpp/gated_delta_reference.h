// The gated delta rule in double precision, one token after the other, and random inputs for it: what the kernels'
// tests compare with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"

namespace {

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

// What the slot has of all slots' values.
template <typename T>
auto slot_of(std::vector<T>& values, int slot) {
  return values.begin() + static_cast<long>(values.size() / kSlots) * slot;
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
      if (fresh[i]) {  // no row may read what lies in its slot
        std::fill_n(slot_of(conv_state, slots[i]), conv_state.size() / kSlots, T(NAN));
        std::fill_n(slot_of(state, slots[i]), state.size() / kSlots, NAN);
      }
    }
  }
};

// The same with one head, which forgets everything at 10 tokens and little at others, of which 30 have equal keys,
// where the triangle is hardest to solve.
inline Case<float> forgetful(Case<float> c) {
  c.a_log[0] = 4;
  std::fill(c.a.begin(), c.a.end(), -8.0f);
  std::fill_n(c.a.begin() + 10, 10, 30.0f);
  std::fill_n(c.b.begin() + 40, 30, 8.0f);
  for (int t = 41; t < 70; ++t) {
    std::copy_n(c.qkv.begin() + 40 * c.channels(), c.channels(), c.qkv.begin() + t * c.channels());
  }
  return c;
}

// The same with one row whose tokens forget nearly nothing, so that errors add up, and write all of their value,
// nothing or some.
inline Case<float> without_decay(Case<float> c) {
  std::fill(c.a_log.begin(), c.a_log.end(), 4.0f);
  std::fill(c.dt_bias.begin(), c.dt_bias.end(), 0.0f);
  std::fill(c.a.begin(), c.a.end(), -16.5f);
  const auto third = static_cast<long>(c.b.size() / 3);
  std::fill_n(c.b.begin(), third, 30.0f);
  std::fill_n(c.b.begin() + third, third, -30.0f);
  return c;
}

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
    if (c.fresh[row]) {
      std::fill_n(slot_of(r.conv_state, c.slots[row]), r.conv_state.size() / kSlots, 0.0);
      std::fill_n(slot_of(r.state, c.slots[row]), r.state.size() / kSlots, 0.0);
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

}  // namespace
