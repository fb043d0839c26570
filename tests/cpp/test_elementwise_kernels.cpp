// The portable kernels of element-wise ops against their definitions in double precision.
#include <array>
#include <bit>
#include <cmath>
#include <vector>

#include "check.h"
#include "kernels/host.h"
#include "random_matrix.h"

namespace {

using mlx_server::HostBfloat16, mlx_server::random;

template <typename T, int IS_GELU, int JOINED, int THREADS>
void gated_mul_kernel(const T* gate, const int* gate_shape, const T* up, T* y) {
#include "elementwise/gated_mul.kernel"
}

template <typename T, int HEADS, int KV_HEADS, int DIM, int GATED, int HAS_NORMS, int THREADS>
void qkv_rope_kernel(const T* qkv, const int* positions, const int* positions_shape, const float* freqs,
                     const int* freqs_shape, const float* norms, T* q, T* k, T* v) {
  constexpr int EPS_BITS = std::bit_cast<int>(1e-5f), LENGTH_FACTOR_BITS = std::bit_cast<int>(1.5f);
#include "elementwise/qkv_rope.kernel"
}

constexpr int kThreads = 64;

template <typename Body>
void launch(int threads, const Body& body) {
  mlx_server::host_launch({(threads + kThreads - 1) / kThreads, 1, 1}, kThreads, body);
}

template <typename T, int kIsGelu, int kJoined = 0>
void check_gated_mul(int rows, int size, double tolerance) {
  const auto gate = random<T>(rows * size * (1 + kJoined), 3), up = kJoined ? gate : random<T>(rows * size);
  const std::array<int, 2> shape{rows, size * (1 + kJoined)};
  std::vector<T> y(static_cast<std::size_t>(rows) * size);
  launch(rows * size,
         [&] { gated_mul_kernel<T, kIsGelu, kJoined, kThreads>(gate.data(), shape.data(), up.data(), y.data()); });
  for (std::size_t i = 0; i < y.size(); ++i) {
    const std::size_t first = kJoined ? i + i / size * size : i, second = kJoined ? first + size : i;
    const double x = float(gate[first]), inner = std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
    const double activation = kIsGelu ? 0.5 * x * (1 + std::tanh(inner)) : x / (1 + std::exp(-x));
    const double want = activation * float(up[second]);
    CHECK_NEAR(float(y[i]), want, tolerance * std::abs(want) + 1e-7);
  }
}

TEST(gated_products_agree_with_their_definitions) {
  for (const int size : {1, 64, 200}) {
    check_gated_mul<float, 0>(3, size, 1e-6);
    check_gated_mul<float, 1>(3, size, 1e-6);
    check_gated_mul<float, 0, 1>(3, size, 1e-6);
    check_gated_mul<float, 1, 1>(3, size, 1e-6);
  }
  check_gated_mul<HostBfloat16, 0>(1, 100, 4e-3);
  check_gated_mul<HostBfloat16, 1, 1>(1, 100, 4e-3);
}

// The first 2 * half features of each query and key turn.
template <typename T, int kHeads, int kKvHeads, int kDim, int kGated, int kHasNorms>
void check_qkv_rope(int tokens, int half, double tolerance) {
  constexpr int kQuery = kGated ? 2 * kDim : kDim, kRow = kHeads * kQuery + 2 * kKvHeads * kDim;
  const auto qkv = random<T>(tokens * kRow);
  const auto norms = random<float>(2 * kDim);
  std::vector<float> freqs;
  std::vector<int> positions;
  for (int i = 0; i < half; ++i) {
    freqs.push_back(std::pow(1e4f, static_cast<float>(i) / static_cast<float>(half)));
  }
  for (int t = 0; t < tokens; ++t) {
    positions.push_back(t * 37);
  }
  std::vector<T> q(static_cast<std::size_t>(tokens) * kHeads * kDim),
      k(static_cast<std::size_t>(tokens) * kKvHeads * kDim);
  std::vector<T> v = k;
  launch(tokens * (kHeads + 2 * kKvHeads) * 32, [&] {
    qkv_rope_kernel<T, kHeads, kKvHeads, kDim, kGated, kHasNorms, kThreads>(
        qkv.data(), positions.data(), &tokens, freqs.data(), &half, norms.data(), q.data(), k.data(), v.data());
  });
  const auto check = [&](int token, const T* x, const float* norm, const T* y) {
    std::vector<double> want;
    double squares = 0;
    for (int i = 0; i < kDim; ++i) {
      want.push_back(float(x[i]));
      squares += want[i] * want[i];
    }
    for (int i = 0; i < kDim; ++i) {
      want[i] *= kHasNorms ? norm[i] / std::sqrt(squares / kDim + 1e-5) : 1.0;
    }
    for (int i = 0; i < half; ++i) {
      const double angle = double(positions[token]) / freqs[i], a = want[i], b = want[i + half];
      want[i] = 1.5 * (a * std::cos(angle) - b * std::sin(angle));
      want[i + half] = 1.5 * (a * std::sin(angle) + b * std::cos(angle));
    }
    for (int i = 0; i < kDim; ++i) {
      CHECK_NEAR(float(y[i]), want[i], tolerance * (1 + std::abs(want[i])));
    }
  };
  for (int token = 0; token < tokens; ++token) {
    const T* x = qkv.data() + token * kRow;
    for (int head = 0; head < kHeads; ++head, x += kQuery) {
      check(token, x, norms.data(), q.data() + (token * kHeads + head) * kDim);
    }
    for (int head = 0; head < kKvHeads; ++head, x += kDim) {
      check(token, x, norms.data() + kDim, k.data() + (token * kKvHeads + head) * kDim);
    }
    for (int i = 0; i < kKvHeads * kDim; ++i) {
      CHECK_EQ(float(v[token * kKvHeads * kDim + i]), float(x[i]));
    }
  }
}

TEST(queries_and_keys_are_normalised_and_turned) {
  check_qkv_rope<float, 3, 1, 8, 0, 0>(5, 4, 3e-5);
  check_qkv_rope<float, 2, 2, 70, 0, 1>(3, 35, 3e-5);  // more features than lanes
  check_qkv_rope<float, 2, 1, 10, 1, 0>(3, 2, 3e-5);   // a part of each head turns
  check_qkv_rope<float, 4, 2, 40, 1, 1>(3, 16, 3e-5);
  check_qkv_rope<float, 1, 1, 7, 0, 1>(2, 0, 3e-5);
  check_qkv_rope<HostBfloat16, 4, 2, 8, 0, 1>(4, 4, 4e-3);
}

}  // namespace
