#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "elementwise/elementwise_cpu.h"

namespace {

using mlx_server::ElementwiseKernels;
using mlx_server::ThreadPool;
using Floats = std::vector<float>;

Floats random(std::int64_t size, float spread) {
  std::mt19937 rng(static_cast<unsigned>(size));
  std::normal_distribution<float> normal(0, spread);
  Floats values(static_cast<std::size_t>(size));
  for (float& v : values) {
    v = normal(rng);
  }
  return values;
}

Floats silu_mul(const ElementwiseKernels& kernels, const Floats& gate, const Floats& up) {
  ThreadPool pool(3);
  Floats y(gate.size());
  const auto size = static_cast<std::int64_t>(y.size());
  mlx_server::silu_mul({gate.data(), up.data(), y.data(), 1, size, size}, pool, kernels);
  return y;
}

TEST(silu_mul_agrees_with_its_definition) {
  for (const ElementwiseKernels* kernels : mlx_server::elementwise_kernels()) {
    for (const std::int64_t size : {0, 1, 3, 7, 8, 9, 100, 50'001}) {
      const Floats gate = random(size, 10), up = random(size, 1);
      const Floats y = silu_mul(*kernels, gate, up);
      for (std::size_t i = 0; i < y.size(); ++i) {
        const double expected = gate[i] / (1 + std::exp(-double{gate[i]})) * up[i];
        CHECK_NEAR(y[i], expected, 5e-7 * std::abs(expected) + 1e-35);
      }
    }
  }
}

TEST(silu_mul_of_extreme_gates) {
  for (const ElementwiseKernels* kernels : mlx_server::elementwise_kernels()) {
    const Floats y = silu_mul(*kernels, {0, 1e30f, -1e3f, INFINITY, NAN, -100, 100}, Floats(7, 1));
    CHECK(y[0] == 0 && y[1] == 1e30f && std::abs(y[2]) < 1e-34 && y[3] == INFINITY);
    CHECK(std::isnan(y[4]) && std::abs(y[5]) < 1e-35 && y[6] == 100);
  }
}

TEST(gelu_mul_agrees_with_its_definition) {
  ThreadPool pool(3);
  for (const ElementwiseKernels* kernels : mlx_server::elementwise_kernels()) {
    for (const std::int64_t size : {0, 1, 7, 8, 9, 50'001}) {
      const Floats gate = random(size, 3), up = random(size, 1);
      Floats y(gate.size());
      mlx_server::gelu_mul({gate.data(), up.data(), y.data(), 1, size, size}, pool, *kernels);
      for (std::size_t i = 0; i < y.size(); ++i) {
        const double x = gate[i], inner = std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
        const double expected = x * up[i] / (1 + std::exp(-2 * inner));
        // What rounds the exponent is multiplied by its size.
        CHECK_NEAR(y[i], expected, 4e-7 * (1 + std::abs(2 * inner)) * std::abs(expected) + 1e-30);
      }
    }
  }
}

TEST(gelu_mul_of_extreme_gates) {
  ThreadPool pool(1);
  for (const ElementwiseKernels* kernels : mlx_server::elementwise_kernels()) {
    const Floats gate{0, 1e30f, -1e30f, INFINITY, NAN, -100, 100}, up(7, 1);
    Floats y(7);
    mlx_server::gelu_mul({gate.data(), up.data(), y.data(), 1, 7, 7}, pool, *kernels);
    CHECK(y[0] == 0 && y[1] == 1e30f && y[2] == 0 && y[3] == INFINITY && std::isnan(y[4]) && y[5] == 0 && y[6] == 100);
  }
}

TEST(silu_mul_does_not_depend_on_the_place) {
  for (const ElementwiseKernels* kernels : mlx_server::elementwise_kernels()) {
    const Floats gate = random(37, 3), up = random(37, 1);
    const Floats y = silu_mul(*kernels, gate, up);
    for (std::size_t i = 0; i < y.size(); ++i) {
      const Floats alone = silu_mul(*kernels, {gate[i]}, {up[i]});
      CHECK_EQ(alone[0], y[i]);
    }
  }
}

TEST(rows_of_gate_and_up_side_by_side) {
  ThreadPool pool(3);
  for (const ElementwiseKernels* kernels : mlx_server::elementwise_kernels()) {
    for (const std::int64_t size : {1, 8, 13, 9'000}) {
      const std::int64_t rows = 5;
      const Floats both = random(rows * 2 * size, 2);
      Floats y(static_cast<std::size_t>(rows * size));
      mlx_server::silu_mul({both.data(), both.data() + size, y.data(), rows, size, 2 * size}, pool, *kernels);
      for (std::int64_t row = 0; row < rows; ++row) {
        const auto gate = both.begin() + row * 2 * size;
        const Floats alone = silu_mul(*kernels, Floats(gate, gate + size), Floats(gate + size, gate + 2 * size));
        CHECK(std::equal(alone.begin(), alone.end(), y.begin() + row * size));
      }
    }
  }
}

TEST(rms_norm_agrees_with_its_definition) {
  ThreadPool pool(3);
  for (const ElementwiseKernels* kernels : mlx_server::elementwise_kernels()) {
    for (const std::int64_t d : {1, 5, 8, 31, 576}) {
      const std::int64_t rows = 100;
      const Floats x = random(rows * d, 2), weight = random(d, 1);
      Floats y(x.size());
      mlx_server::rms_norm({x.data(), weight.data(), y.data(), rows, d, 1e-5f}, pool, *kernels);
      for (std::int64_t row = 0; row < rows; ++row) {
        double squares = 0;
        for (std::int64_t i = row * d; i < (row + 1) * d; ++i) {
          squares += double{x[i]} * x[i];
        }
        for (std::int64_t i = 0; i < d; ++i) {
          const double expected = x[row * d + i] / std::sqrt(squares / d + 1e-5) * weight[i];
          CHECK_NEAR(y[row * d + i], expected, 2e-6 * std::abs(expected));
        }
      }
    }
  }
}

// Of x [d]: its norm with the weights `norm`, if there are any, its first 2 * half features turned.
std::vector<double> turned(const float* x, std::int64_t d, const float* norm, const Floats& freqs, int position,
                           double length_factor) {
  std::vector<double> y(x, x + d);
  if (norm != nullptr) {
    double squares = 0;
    for (const double v : y) {
      squares += v * v;
    }
    for (std::size_t i = 0; i < y.size(); ++i) {
      y[i] *= norm[i] / std::sqrt(squares / static_cast<double>(d) + 1e-5);
    }
  }
  for (std::size_t i = 0; i < freqs.size(); ++i) {
    const std::size_t second = i + freqs.size();
    const double angle = static_cast<float>(position) / freqs[i], a = y[i], b = y[second];
    y[i] = (a * std::cos(angle) - b * std::sin(angle)) * length_factor;
    y[second] = (a * std::sin(angle) + b * std::cos(angle)) * length_factor;
  }
  return y;
}

void check_qkv_rope(std::int64_t d, std::int64_t half, std::int64_t gap, bool gated, bool has_norms) {
  ThreadPool pool(3);
  const std::int64_t tokens = 70, heads = 3, kv_heads = 2, q_stride = gated ? 2 * d : d;
  const std::int64_t stride = heads * q_stride + 2 * kv_heads * d + gap;
  const Floats x = random(tokens * stride, 1), norms = random(2 * d, 1);
  Floats freqs, q(static_cast<std::size_t>(tokens * heads * d)), k(static_cast<std::size_t>(tokens * kv_heads * d)),
      v = k;
  std::vector<std::int32_t> positions;
  for (std::int64_t i = 0; i < half; ++i) {
    freqs.push_back(std::pow(10'000.0f, static_cast<float>(i) / static_cast<float>(half)));
  }
  for (std::int64_t t = 0; t < tokens; ++t) {
    positions.push_back(static_cast<std::int32_t>(t * t * 7 % 5000));
  }
  for (const ElementwiseKernels* kernels : mlx_server::elementwise_kernels()) {
    mlx_server::qkv_rope({.x = x.data(),
                          .positions = positions.data(),
                          .freqs = freqs.data(),
                          .norms = has_norms ? norms.data() : nullptr,
                          .q = q.data(),
                          .k = k.data(),
                          .v = v.data(),
                          .tokens = tokens,
                          .token_stride = stride,
                          .heads = heads,
                          .kv_heads = kv_heads,
                          .d = d,
                          .half = half,
                          .eps = 1e-5f,
                          .length_factor = 1.5f,
                          .gated = gated},
                         pool, *kernels);
    const auto check = [&](std::int64_t token, const float* in, const float* norm, const float* out) {
      const auto want = turned(in, d, has_norms ? norm : nullptr, freqs, positions[token], 1.5);
      for (std::int64_t i = 0; i < d; ++i) {
        CHECK_NEAR(out[i], want[i], 1e-5);
      }
    };
    for (std::int64_t t = 0; t < tokens; ++t) {
      const float* in = x.data() + t * stride;
      for (std::int64_t head = 0; head < heads; ++head, in += q_stride) {
        check(t, in, norms.data(), q.data() + (t * heads + head) * d);
      }
      for (std::int64_t head = 0; head < kv_heads; ++head, in += d) {
        check(t, in, norms.data() + d, k.data() + (t * kv_heads + head) * d);
      }
      CHECK(std::equal(in, in + kv_heads * d, v.data() + t * kv_heads * d));
    }
  }
}

TEST(qkv_rope_agrees_with_its_definition) {
  for (const bool gated : {false, true}) {
    for (const bool has_norms : {false, true}) {
      check_qkv_rope(64, 32, 0, gated, has_norms);
      check_qkv_rope(11, 3, 0, gated, has_norms);
      check_qkv_rope(8, 4, 5, gated, has_norms);
      check_qkv_rope(8, 0, 0, gated, has_norms);
    }
  }
}

}  // namespace
