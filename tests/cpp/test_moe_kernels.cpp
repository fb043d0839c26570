// The portable kernels of moe: the router against the CPU's, experts against the definition in double precision.
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "kernels/host.h"
#include "moe/moe_cpu.h"
#include "random_matrix.h"

namespace {

using mlx_server::HostBfloat16, mlx_server::Matrix, mlx_server::Word, mlx_server::random, mlx_server::rng;
using Floats = std::vector<float>;

template <typename T, int PER_LANE, int TOP_K, int SOFTMAX, int NORMALIZE>
void route_kernel(const T* logits, const int* logits_shape, int* experts, float* weights) {
#include "moe/moe_route.kernel"
}

template <typename T, int kExperts, int kTopK, int kSoftmax, int kNormalize>
void check_route(const Floats& logits) {
  const std::size_t tokens = logits.size() / kExperts, size = tokens * kTopK;
  std::vector<T> typed;
  Floats rounded;
  for (const float x : logits) {
    typed.push_back(T(x));
    rounded.push_back(static_cast<float>(typed.back()));
  }
  std::vector<std::int32_t> experts(size), expected_experts(size);
  Floats weights(size), expected_weights(size);
  const std::array<int, 2> shape{static_cast<int>(tokens), kExperts};
  constexpr int kPerLane = std::bit_ceil((kExperts + 31u) / 32);
  mlx_server::host_launch({shape[0], 1, 1}, 32, [&] {
    route_kernel<T, kPerLane, kTopK, kSoftmax, kNormalize>(typed.data(), shape.data(), experts.data(), weights.data());
  });
  mlx_server::ThreadPool pool(1);
  mlx_server::route({rounded.data(), expected_experts.data(), expected_weights.data(),
                     static_cast<std::int64_t>(tokens), kExperts, kTopK, kSoftmax != 0, kNormalize != 0},
                    pool);
  CHECK(experts == expected_experts);
  for (std::size_t i = 0; i < size; ++i) {
    CHECK(std::isnan(weights[i]) == std::isnan(expected_weights[i]));
    if (!std::isnan(weights[i])) {
      CHECK_NEAR(weights[i], expected_weights[i], 1e-6 * std::abs(expected_weights[i]));
    }
  }
}

// Eighths, far apart and with ties: no two scores differ by a rounding.
Floats coarse_logits(std::size_t size) {
  std::mt19937 rng(static_cast<unsigned>(size));
  Floats logits(size);
  for (float& x : logits) {
    x = static_cast<float>(static_cast<int>(rng() % 64) - 32) / 8;
  }
  return logits;
}

TEST(route_agrees_with_the_cpu) {
  check_route<float, 64, 8, 1, 1>(coarse_logits(5 * 64));
  check_route<float, 512, 10, 1, 1>(coarse_logits(2 * 512));
  check_route<float, 7, 7, 1, 0>(coarse_logits(3 * 7));
  check_route<float, 40, 32, 0, 1>(coarse_logits(3 * 40));
  check_route<float, 33, 1, 0, 0>(coarse_logits(3 * 33));
  check_route<float, 1, 1, 1, 1>(coarse_logits(2));
  check_route<HostBfloat16, 128, 8, 1, 1>(coarse_logits(4 * 128));
}

TEST(route_gives_experts_in_range_whatever_the_logits) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
  for (const float bad : {kNan, kInfinity}) {
    check_route<float, 4, 2, 1, 1>({0, 1, bad, 2, bad, 1, 5, 2, 0, 1, 2, 3});
  }
  check_route<float, 4, 2, 1, 0>({-kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, 0, 1, -kInfinity});
  check_route<float, 4, 3, 0, 0>({0, kNan, kInfinity, -kInfinity});
}

template <typename T, int BITS, int THREADS>
void hidden_kernel(const T* x, const int* x_shape, const int* experts, const int* experts_shape,
                   const Word<T, BITS>* gate, const int* gate_shape, const T* gate_scales, const int* gate_scales_shape,
                   const T* gate_biases, const Word<T, BITS>* up, const T* up_scales, const T* up_biases, T* hidden) {
#include "moe/moe_hidden.kernel"
}

template <typename T, int BITS, int HAS_SHARED, int THREADS>
void output_kernel(const T* hidden, const int* hidden_shape, const int* experts, const int* experts_shape,
                   const float* weights, const Word<T, BITS>* down, const int* down_shape, const T* scales,
                   const int* scales_shape, const T* biases, const T* shared, T* y) {
#include "moe/moe_output.kernel"
}

template <typename T, int HAS_SHARED, int THREADS>
void join_kernel(const T* rows, const int* rows_shape, const std::uint32_t* row_of_pair, const float* weights,
                 const int* weights_shape, const T* shared, T* y) {
#include "moe/moe_join.kernel"
}

struct Sizes {
  int tokens, num_experts, top_k, d, n;
};

template <typename T, int BITS, int HAS_SHARED>
void check_few_tokens(const Sizes& sizes, int group_size, double tolerance) {
  constexpr int kThreads = 64, kColumns = 4;
  const auto [tokens, num_experts, top_k, d, n] = sizes;
  const Matrix<T, BITS> gate(num_experts, n, d, group_size), up(num_experts, n, d, group_size),
      down(num_experts, d, n, group_size);
  const auto x = random<T>(tokens * d), shared = random<T>(tokens * d);
  const auto weights = random<float>(tokens * top_k);
  std::vector<int> experts;
  for (int i = 0; i < tokens * top_k; ++i) {
    experts.push_back(static_cast<int>(rng() % static_cast<unsigned>(num_experts)));
  }
  const std::array<int, 2> x_shape{tokens, d}, experts_shape{tokens, top_k};
  const std::array<int, 3> hidden_shape{tokens, top_k, n};
  std::vector<T> hidden(static_cast<std::size_t>(tokens * top_k * n)), y(static_cast<std::size_t>(tokens * d));

  constexpr int kGroupColumns = kColumns * kThreads / 32;
  mlx_server::host_launch({(n + kGroupColumns - 1) / kGroupColumns, top_k, tokens}, kThreads, [&] {
    hidden_kernel<T, BITS, kThreads>(x.data(), x_shape.data(), experts.data(), experts_shape.data(), gate.words.data(),
                                     gate.shape.data(), gate.scales_data(), gate.scales_shape.data(),
                                     gate.biases_data(), up.words.data(), up.scales_data(), up.biases_data(),
                                     hidden.data());
  });
  mlx_server::host_launch({d / kColumns, tokens, 1}, kThreads, [&] {
    output_kernel<T, BITS, HAS_SHARED, kThreads>(
        hidden.data(), hidden_shape.data(), experts.data(), experts_shape.data(), weights.data(), down.words.data(),
        down.shape.data(), down.scales_data(), down.scales_shape.data(), down.biases_data(), shared.data(), y.data());
  });

  for (int token = 0; token < tokens; ++token) {
    std::vector<double> want(shared.begin() + token * d, shared.begin() + (token + 1) * d);
    want.resize(static_cast<std::size_t>(d));
    for (double& v : want) {
      v *= HAS_SHARED;
    }
    for (int pair = token * top_k; pair < (token + 1) * top_k; ++pair) {
      const int expert = experts[static_cast<std::size_t>(pair)];
      std::vector<double> features;
      for (int i = 0; i < n; ++i) {
        const double g = gate.multiply(expert, i, d, x.data() + token * d);
        features.push_back(g / (1 + std::exp(-g)) * up.multiply(expert, i, d, x.data() + token * d));
      }
      for (int i = 0; i < d; ++i) {
        want[static_cast<std::size_t>(i)] +=
            static_cast<double>(weights[static_cast<std::size_t>(pair)]) * down.multiply(expert, i, n, features.data());
      }
    }
    double largest = 1;
    for (const double v : want) {
      largest = std::max(largest, std::abs(v));
    }
    for (int i = 0; i < d; ++i) {
      CHECK_NEAR(static_cast<float>(y[static_cast<std::size_t>(token * d + i)]), want[static_cast<std::size_t>(i)],
                 tolerance * largest);
    }
  }
}

TEST(few_tokens_of_every_width) {
  const Sizes sizes{2, 4, 3, 64, 96};
  check_few_tokens<float, 2, 1>(sizes, 32, 2e-6);
  check_few_tokens<float, 3, 0>(sizes, 32, 2e-6);
  check_few_tokens<float, 4, 1>(sizes, 32, 2e-6);
  check_few_tokens<float, 5, 0>(sizes, 32, 2e-6);
  check_few_tokens<float, 6, 1>(sizes, 32, 2e-6);
  check_few_tokens<float, 8, 0>(sizes, 32, 2e-6);
  check_few_tokens<float, 32, 1>(sizes, 1, 2e-6);
}

TEST(few_tokens_more_than_a_turn_of_the_lanes) {
  check_few_tokens<float, 4, 1>({1, 2, 1, 640, 128}, 128, 4e-6);
  check_few_tokens<float, 3, 1>({1, 1, 1, 64, 1152}, 64, 4e-6);
}

TEST(few_tokens_in_bfloat16) {
  check_few_tokens<HostBfloat16, 4, 1>({2, 3, 2, 64, 64}, 64, 2e-2);
  check_few_tokens<HostBfloat16, 32, 0>({1, 3, 2, 32, 64}, 1, 2e-2);
}

TEST(join_puts_rows_in_order_and_adds_them_up) {
  constexpr int kTokens = 3, kTopK = 2, kDim = 70, kThreads = 64;
  const auto rows = random<float>(kTokens * kTopK * kDim), weights = random<float>(kTokens * kTopK),
             shared = random<float>(kTokens * kDim);
  const std::vector<std::uint32_t> row_of_pair{4, 0, 2, 5, 1, 3};
  const std::array<int, 2> rows_shape{kTokens * kTopK, kDim}, weights_shape{kTokens, kTopK};
  std::vector<float> y(shared.size()), y_alone(shared.size());
  mlx_server::host_launch({(kDim + kThreads - 1) / kThreads, kTokens, 1}, kThreads, [&] {
    join_kernel<float, 1, kThreads>(rows.data(), rows_shape.data(), row_of_pair.data(), weights.data(),
                                    weights_shape.data(), shared.data(), y.data());
    join_kernel<float, 0, kThreads>(rows.data(), rows_shape.data(), row_of_pair.data(), weights.data(),
                                    weights_shape.data(), shared.data(), y_alone.data());
  });
  for (int i = 0; i < kTokens * kDim; ++i) {
    double want = 0;
    for (int j = 0; j < kTopK; ++j) {
      const auto pair = static_cast<std::size_t>(i / kDim * kTopK + j);
      want += static_cast<double>(weights[pair]) *
              static_cast<double>(rows[static_cast<std::size_t>(row_of_pair[pair]) * kDim + i % kDim]);
    }
    CHECK_NEAR(y_alone[static_cast<std::size_t>(i)], want, 1e-6);
    CHECK_NEAR(y[static_cast<std::size_t>(i)], want + static_cast<double>(shared[static_cast<std::size_t>(i)]), 1e-6);
  }
}

}  // namespace
