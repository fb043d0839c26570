// The portable kernels of moe: the router against the CPU's, experts against the definition in double precision.
#include <algorithm>
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

using mlx_server::HostBfloat16, mlx_server::is_row, mlx_server::Matrix, mlx_server::random, mlx_server::rng,
    mlx_server::row_of, mlx_server::Word;
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

std::vector<int> random_experts(int size, int num_experts) {
  std::vector<int> experts;
  for (int i = 0; i < size; ++i) {
    experts.push_back(static_cast<int>(rng() % static_cast<unsigned>(num_experts)));
  }
  return experts;
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
  const auto experts = random_experts(tokens * top_k, num_experts);
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

template <int EXPERTS, int ROWS, int THREADS>
void sort_kernel(const int* experts, const int* experts_shape, int* token_of_row, std::uint32_t* row_of_pair,
                 int* tiles) {
#include "moe/moe_sort.kernel"
}

struct Sorted {
  std::vector<int> token_of_row;
  std::vector<std::uint32_t> row_of_pair;
  std::vector<std::array<int, 3>> tiles;
};

template <int EXPERTS, int ROWS>
Sorted sort(const std::vector<int>& experts, int top_k) {
  constexpr int kThreads = 64;
  const int pairs = static_cast<int>(experts.size());
  const std::array<int, 2> shape{pairs / top_k, top_k};
  Sorted sorted{
      std::vector<int>(experts.size(), -1), std::vector<std::uint32_t>(experts.size()),
      std::vector<std::array<int, 3>>(static_cast<std::size_t>(pairs / ROWS + std::min(EXPERTS, pairs)), {-1, -1, -1})};
  mlx_server::host_launch({1, 1, 1}, kThreads, [&] {
    sort_kernel<EXPERTS, ROWS, kThreads>(experts.data(), shape.data(), sorted.token_of_row.data(),
                                         sorted.row_of_pair.data(), sorted.tiles.front().data());
  });
  return sorted;
}

template <int EXPERTS, int ROWS>
void check_sort(const std::vector<int>& experts, int top_k) {
  const Sorted sorted = sort<EXPERTS, ROWS>(experts, top_k);
  std::vector<int> expert_of_row(experts.size(), -1);
  for (std::size_t pair = 0; pair < experts.size(); ++pair) {
    const std::uint32_t row = sorted.row_of_pair[pair];
    CHECK(row < experts.size() && expert_of_row[row] == -1);
    expert_of_row[row] = experts[pair];
    CHECK(sorted.token_of_row[row] == static_cast<int>(pair) / top_k);
  }
  int next = 0;
  for (const auto& [expert, row, end] : sorted.tiles) {
    if (row == end) {
      continue;
    }
    CHECK(row == next && row < end && end <= row + ROWS);
    for (next = row; next < end; ++next) {
      CHECK(expert_of_row[static_cast<std::size_t>(next)] == expert);
    }
  }
  CHECK(next == static_cast<int>(experts.size()));
}

TEST(sort_gives_each_pair_a_row_and_each_row_a_tile) {
  check_sort<5, 16>({3}, 1);
  check_sort<1, 16>(std::vector<int>(33), 1);
  check_sort<7, 16>(std::vector<int>(48, 6), 3);
  check_sort<7, 16>(random_experts(300, 7), 3);
  check_sort<4, 64>(random_experts(600, 4), 2);
  check_sort<150, 32>(random_experts(800, 150), 8);  // more experts than threads
}

template <typename T, int BITS, int GROUP_SIZE, int ROWS, int GATHER, int THREADS>
void matrix_kernel(const T* x, const int* x_shape, const Word<T, BITS == 16 ? 32 : BITS>* weight,
                   const int* weight_shape, const T* scales, const T* biases, const int* token_of_row, const int* tiles,
                   T* y) {
#include "moe/moe_matrix.kernel"
}

// The rows of x, or those that `sorted` gathers, against the matrices of their experts.
template <typename T, int BITS, int GROUP_SIZE, int ROWS, int GATHER>
std::vector<T> multiply_sorted(const std::vector<T>& x, int k, const Matrix<T, BITS == 16 ? 32 : BITS>& matrix,
                               const Sorted& sorted) {
  constexpr int kThreads = 128, kColumns = kThreads / 2;
  const int n = matrix.shape[1];
  const std::array<int, 2> x_shape{static_cast<int>(x.size()) / k, k};
  std::vector<T> y(sorted.token_of_row.size() * static_cast<std::size_t>(n));
  mlx_server::host_launch({(n + kColumns - 1) / kColumns, static_cast<int>(sorted.tiles.size()), 1}, kThreads, [&] {
    matrix_kernel<T, BITS, GROUP_SIZE, ROWS, GATHER, kThreads>(
        x.data(), x_shape.data(), matrix.words.data(), matrix.shape.data(), matrix.scales_data(), matrix.biases_data(),
        sorted.token_of_row.data(), sorted.tiles.front().data(), y.data());
  });
  return y;
}

template <typename T, int BITS, int GROUP_SIZE, int ROWS>
void check_sorted(int tokens, int top_k, int n, int k, double tolerance) {
  constexpr int kExperts = 5;
  const Matrix<T, BITS == 16 ? 32 : BITS> matrix(kExperts, n, k, GROUP_SIZE);
  const auto experts = random_experts(tokens * top_k, kExperts - 1);  // one has no rows
  const Sorted sorted = sort<kExperts, ROWS>(experts, top_k);
  const auto x = random<T>(tokens * k);
  std::vector<T> gathered;  // what x is without GATHER
  for (const int token : sorted.token_of_row) {
    gathered.insert(gathered.end(), x.begin() + token * k, x.begin() + (token + 1) * k);
  }
  const auto y = multiply_sorted<T, BITS, GROUP_SIZE, ROWS, 1>(x, k, matrix, sorted);
  CHECK(is_row(y, multiply_sorted<T, BITS, GROUP_SIZE, ROWS, 0>(gathered, k, matrix, sorted), 0,
               static_cast<int>(y.size())));
  for (int pair = 0; pair < tokens * top_k; ++pair) {
    const auto row = sorted.row_of_pair[static_cast<std::size_t>(pair)];
    for (int c = 0; c < n; ++c) {
      const double expected =
          matrix.multiply(experts[static_cast<std::size_t>(pair)], c, k, x.data() + pair / top_k * k);
      CHECK_NEAR(static_cast<double>(y[row * static_cast<std::size_t>(n) + static_cast<std::size_t>(c)]), expected,
                 tolerance * std::max(1.0, std::abs(expected)));
    }
  }
}

TEST(sorted_rows_of_every_width) {
  check_sorted<float, 2, 32, 16>(9, 2, 9, 96, 1e-5);
  check_sorted<float, 3, 32, 16>(9, 2, 9, 160, 1e-5);
  check_sorted<float, 4, 64, 16>(40, 2, 70, 128, 1e-5);  // experts of several tiles
  check_sorted<float, 5, 64, 16>(2, 1, 9, 192, 1e-5);
  check_sorted<float, 6, 64, 32>(33, 3, 9, 192, 1e-5);
  check_sorted<float, 8, 128, 16>(3, 2, 9, 384, 1e-5);
  check_sorted<float, 16, 32, 16>(9, 2, 70, 160, 1e-5);
  check_sorted<HostBfloat16, 4, 64, 64>(70, 2, 12, 256, 5e-2);
  check_sorted<HostBfloat16, 16, 32, 32>(20, 2, 12, 96, 3e-2);
}

TEST(a_sorted_row_does_not_depend_on_the_rows_beside_it) {
  constexpr int kTokens = 40, kTopK = 2, kExperts = 3, kN = 6, kDim = 352;
  const Matrix<HostBfloat16, 4> matrix(kExperts, kN, kDim, 32);
  const auto x = random<HostBfloat16>(kTokens * kDim);
  const auto experts = random_experts(kTokens * kTopK, kExperts);
  const Sorted sorted = sort<kExperts, 32>(experts, kTopK);
  const auto together = multiply_sorted<HostBfloat16, 4, 32, 32, 1>(x, kDim, matrix, sorted);
  for (const int pair : {0, 1, 33, kTokens * kTopK - 1}) {
    const Sorted alone = sort<kExperts, 16>({experts[static_cast<std::size_t>(pair)]}, 1);
    const auto y = multiply_sorted<HostBfloat16, 4, 32, 16, 1>(row_of(x, pair / kTopK, kDim), kDim, matrix, alone);
    CHECK(is_row(y, together, static_cast<int>(sorted.row_of_pair[static_cast<std::size_t>(pair)]), kN));
  }
}

}  // namespace
