// The portable kernels of element-wise ops against their definitions in double precision.
#include <array>
#include <cmath>
#include <vector>

#include "check.h"
#include "kernels/host.h"
#include "random_matrix.h"

namespace {

using mlx_server::HostBfloat16, mlx_server::random;

template <typename T, int IS_GELU, int THREADS>
void gated_mul_kernel(const T* gate, const int* gate_shape, const T* up, T* y) {
#include "elementwise/gated_mul.kernel"
}

template <typename T, int TRADITIONAL, int THREADS>
void rope_kernel(const T* x, const int* x_shape, const int* positions, const float* freqs, const int* freqs_shape,
                 T* y) {
#include "elementwise/rope.kernel"
}

constexpr int kThreads = 64;

template <typename Body>
void launch(int threads, const Body& body) {
  mlx_server::host_launch({(threads + kThreads - 1) / kThreads, 1, 1}, kThreads, body);
}

template <typename T, int kIsGelu>
void check_gated_mul(int size, double tolerance) {
  const auto gate = random<T>(size, 3), up = random<T>(size);
  std::vector<T> y(gate.size());
  launch(size, [&] { gated_mul_kernel<T, kIsGelu, kThreads>(gate.data(), &size, up.data(), y.data()); });
  for (std::size_t i = 0; i < y.size(); ++i) {
    const double x = float(gate[i]), inner = std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
    const double activation = kIsGelu ? 0.5 * x * (1 + std::tanh(inner)) : x / (1 + std::exp(-x));
    CHECK_NEAR(float(y[i]), activation * float(up[i]), tolerance * std::abs(activation * float(up[i])) + 1e-7);
  }
}

TEST(gated_products_agree_with_their_definitions) {
  for (const int size : {1, 64, 200}) {
    check_gated_mul<float, 0>(size, 1e-6);
    check_gated_mul<float, 1>(size, 1e-6);
  }
  check_gated_mul<HostBfloat16, 0>(100, 4e-3);
  check_gated_mul<HostBfloat16, 1>(100, 4e-3);
}

// The first 2 * half features of each head turn.
template <typename T, int kTraditional>
void check_rope(int tokens, int heads, int dim, int half, double tolerance) {
  const auto x = random<T>(tokens * heads * dim);
  std::vector<float> freqs;
  std::vector<int> positions;
  for (int i = 0; i < half; ++i) {
    freqs.push_back(std::pow(1e4f, static_cast<float>(i) / static_cast<float>(half)));
  }
  for (int t = 0; t < tokens; ++t) {
    positions.push_back(t * 37);
  }
  std::vector<T> y(x.size());
  const std::array<int, 3> x_shape{tokens, heads, dim};
  launch(tokens * heads * (dim - half), [&] {
    rope_kernel<T, kTraditional, kThreads>(x.data(), x_shape.data(), positions.data(), freqs.data(), &half, y.data());
  });
  for (int head = 0; head < tokens * heads; ++head) {
    std::vector<double> want(x.begin() + head * dim, x.begin() + (head + 1) * dim);
    for (int i = 0; i < half; ++i) {
      const int first = kTraditional ? 2 * i : i, second = kTraditional ? 2 * i + 1 : i + half;
      const double angle = double(positions[head / heads]) / freqs[i], a = want[first], b = want[second];
      want[first] = a * std::cos(angle) - b * std::sin(angle);
      want[second] = a * std::sin(angle) + b * std::cos(angle);
    }
    for (int i = 0; i < dim; ++i) {
      CHECK_NEAR(float(y[head * dim + i]), want[i], tolerance * (1 + std::abs(want[i])));
    }
  }
}

TEST(rope_turns_pairs_of_features) {
  check_rope<float, 0>(5, 3, 8, 4, 2e-5);
  check_rope<float, 1>(5, 3, 8, 4, 2e-5);
  check_rope<float, 0>(3, 2, 10, 2, 2e-5);  // a part of each head turns
  check_rope<float, 1>(3, 1, 7, 3, 2e-5);
  check_rope<HostBfloat16, 0>(4, 2, 8, 4, 4e-3);
}

}  // namespace
