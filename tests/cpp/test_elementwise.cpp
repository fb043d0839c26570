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
  mlx_server::silu_mul({gate.data(), up.data(), y.data(), static_cast<std::int64_t>(y.size())}, pool, kernels);
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
      mlx_server::gelu_mul({gate.data(), up.data(), y.data(), size}, pool, *kernels);
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
    mlx_server::gelu_mul({gate.data(), up.data(), y.data(), 7}, pool, *kernels);
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

void check_rope(std::int64_t d, std::int64_t half, std::int64_t gap, bool traditional) {
  ThreadPool pool(3);
  const std::int64_t tokens = 70, heads = 3, stride = heads * d + gap;
  const Floats x = random(tokens * stride, 1);
  Floats freqs, y(static_cast<std::size_t>(tokens * heads * d));
  std::vector<std::int32_t> positions;
  for (std::int64_t i = 0; i < half; ++i) {
    freqs.push_back(std::pow(10'000.0f, static_cast<float>(i) / static_cast<float>(half)));
  }
  for (std::int64_t t = 0; t < tokens; ++t) {
    positions.push_back(static_cast<std::int32_t>(t * t * 7 % 5000));
  }
  mlx_server::rope({x.data(), positions.data(), freqs.data(), y.data(), tokens, heads, d, half, stride, traditional},
                   pool);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t h = 0; h < heads; ++h) {
      const float* in = x.data() + t * stride + h * d;
      const float* out = y.data() + (t * heads + h) * d;
      for (std::int64_t i = 0; i < half; ++i) {
        const std::int64_t a = traditional ? 2 * i : i, b = traditional ? 2 * i + 1 : i + half;
        const double angle = static_cast<float>(positions[t]) / freqs[i];
        CHECK_NEAR(out[a], in[a] * std::cos(angle) - in[b] * std::sin(angle), 2e-6);
        CHECK_NEAR(out[b], in[a] * std::sin(angle) + in[b] * std::cos(angle), 2e-6);
      }
      CHECK(std::memcmp(out + 2 * half, in + 2 * half, (d - 2 * half) * sizeof(float)) == 0);
    }
  }
}

TEST(rope_agrees_with_its_definition) {
  for (const bool traditional : {false, true}) {
    check_rope(64, 32, 0, traditional);
    check_rope(10, 3, 0, traditional);
    check_rope(8, 4, 5, traditional);
    check_rope(8, 0, 0, traditional);
  }
}

}  // namespace
