#include "moe/moe_cpu.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <random>

#include "check.h"

namespace {

using mlx_server::LinearKernels;
using mlx_server::LinearWeights;
using mlx_server::ThreadPool;
using Floats = std::vector<float>;

Floats random_floats(std::int64_t size, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  Floats values(static_cast<std::size_t>(size));
  std::generate(values.begin(), values.end(), [&] { return normal(rng); });
  return values;
}

// All experts' matrices [n, k]. Each byte of weights belongs to one element of bits 8, two of bits 4, a fourth of 32.
struct Matrices {
  std::int64_t n, k;
  int group_size, bits;
  std::vector<std::uint8_t> weight;
  Floats scales, biases;

  Matrices(std::int64_t num_experts, std::int64_t n, std::int64_t k, int group_size, int bits, std::mt19937& rng)
      : n(n),
        k(k),
        group_size(group_size),
        bits(bits),
        weight(static_cast<std::size_t>(num_experts * n * k * bits / 8)) {
    if (bits == 32) {
      const Floats values = random_floats(num_experts * n * k, rng);
      std::memcpy(weight.data(), values.data(), weight.size());
      return;
    }
    std::generate(weight.begin(), weight.end(), [&] { return static_cast<std::uint8_t>(rng()); });
    scales = random_floats(num_experts * n * k / group_size, rng);
    biases = random_floats(num_experts * n * k / group_size, rng);
  }

  LinearWeights weights() const { return {weight.data(), scales.data(), biases.data(), n, k, group_size, bits}; }

  double element(std::int64_t at) const {
    const auto i = static_cast<std::size_t>(at);
    if (bits == 32) {
      float value;
      std::memcpy(&value, weight.data() + 4 * i, sizeof(value));
      return value;
    }
    const int q = bits == 8 ? weight[i] : (weight[i / 2] >> (i % 2 * 4)) & 15;
    const std::size_t group = i / static_cast<std::size_t>(group_size);
    return static_cast<double>(scales[group]) * q + static_cast<double>(biases[group]);
  }

  // A row of the expert's matrix times x [k].
  template <typename T>
  double multiply(std::int64_t expert, std::int64_t row, const T* x) const {
    double sum = 0;
    for (std::int64_t i = 0; i < k; ++i) {
      sum += element((expert * n + row) * k + i) * static_cast<double>(x[i]);
    }
    return sum;
  }
};

struct Problem {
  std::int64_t tokens, num_experts, top_k, d, n;
  std::mt19937 rng;
  Matrices gate, up, down;
  Floats x, weights, shared;
  std::vector<std::int32_t> experts;

  Problem(std::int64_t tokens, std::int64_t num_experts, std::int64_t top_k, int group_size, int bits,
          std::int64_t d = 128, std::int64_t n = 128)
      : tokens(tokens),
        num_experts(num_experts),
        top_k(top_k),
        d(d),
        n(n),
        rng(static_cast<unsigned>(tokens * 31 + num_experts + bits)),
        gate(num_experts, n, d, group_size, bits, rng),
        up(num_experts, n, d, group_size, bits, rng),
        down(num_experts, d, n, group_size, bits, rng),
        x(random_floats(tokens * d, rng)),
        weights(random_floats(tokens * top_k, rng)),
        shared(random_floats(tokens * d, rng)),
        experts(static_cast<std::size_t>(tokens * top_k)) {
    for (float& v : x) {
      v /= 100;  // quantized weights are up to 1000 large here
    }
    std::generate(experts.begin(), experts.end(), [&] { return static_cast<std::int32_t>(rng() % num_experts); });
  }

  // y of tokens [begin, end)
  Floats solve(const LinearKernels& kernels, ThreadPool& pool, std::int64_t begin, std::int64_t end,
               bool with_shared = true) const {
    Floats hidden(static_cast<std::size_t>((end - begin) * top_k * n), NAN);
    Floats y(static_cast<std::size_t>((end - begin) * d), NAN);
    mlx_server::moe_mlp({.x = x.data() + begin * d,
                         .experts = experts.data() + begin * top_k,
                         .weights = weights.data() + begin * top_k,
                         .gate = gate.weights(),
                         .up = up.weights(),
                         .down = down.weights(),
                         .shared = with_shared ? shared.data() + begin * d : nullptr,
                         .hidden = hidden.data(),
                         .y = y.data(),
                         .tokens = end - begin,
                         .top_k = top_k,
                         .num_experts = num_experts},
                        pool, kernels);
    return y;
  }

  // The definition, in double.
  std::vector<double> expected(std::int64_t token) const {
    std::vector<double> y(shared.begin() + token * d, shared.begin() + (token + 1) * d);
    std::vector<double> hidden(static_cast<std::size_t>(n));
    for (std::int64_t j = token * top_k; j < (token + 1) * top_k; ++j) {
      const std::int64_t expert = experts[static_cast<std::size_t>(j)];
      for (std::int64_t i = 0; i < n; ++i) {
        const double g = gate.multiply(expert, i, x.data() + token * d),
                     u = up.multiply(expert, i, x.data() + token * d);
        hidden[static_cast<std::size_t>(i)] = g / (1 + std::exp(-g)) * u;
      }
      for (std::int64_t i = 0; i < d; ++i) {
        y[static_cast<std::size_t>(i)] +=
            weights[static_cast<std::size_t>(j)] * down.multiply(expert, i, hidden.data());
      }
    }
    return y;
  }
};

void check_definition(const LinearKernels& kernels, ThreadPool& pool, const Problem& problem) {
  const Floats y = problem.solve(kernels, pool, 0, problem.tokens);
  for (std::int64_t token = 0; token < problem.tokens; ++token) {
    const std::vector<double> expected = problem.expected(token);
    double largest = 1;
    for (const double v : expected) {
      largest = std::max(largest, std::abs(v));
    }
    for (std::int64_t i = 0; i < problem.d; ++i) {
      CHECK_NEAR(y[static_cast<std::size_t>(token * problem.d + i)], expected[static_cast<std::size_t>(i)],
                 2e-5 * largest);
    }
  }
}

TEST(mlp_agrees_with_the_definition) {
  ThreadPool pool(3);
  for (const LinearKernels* kernels : mlx_server::linear_kernels()) {
    std::cerr << "  " << kernels->name << "\n";
    for (const int bits : {4, 8, 32}) {
      for (const std::int64_t tokens : {1, 3, 20}) {
        check_definition(*kernels, pool, Problem(tokens, 4, 2, 64, bits));
      }
    }
    check_definition(*kernels, pool, Problem(9, 5, 3, 32, 4, 96, 160));
    check_definition(*kernels, pool, Problem(2, 3, 3, 128, 8, 256, 128));
    check_definition(*kernels, pool, Problem(300, 1, 1, 32, 4, 32, 32));  // one expert, several segments
    check_definition(*kernels, pool, Problem(2, 200, 1, 32, 4, 32, 64));  // most experts are not used
  }
}

TEST(a_token_does_not_depend_on_the_tokens_beside_it) {
  ThreadPool one(1), four(4);
  for (const LinearKernels* kernels : mlx_server::linear_kernels()) {
    for (const int bits : {4, 8, 32}) {
      const Problem problem(150, 3, 2, 32, bits, 160, 96);
      Floats alone;
      for (std::int64_t token = 0; token < problem.tokens; ++token) {
        const Floats y = problem.solve(*kernels, one, token, token + 1);
        alone.insert(alone.end(), y.begin(), y.end());
      }
      for (const std::int64_t tokens : {1, 2, 3, 4, 5, 6, 7, 33, 150}) {
        const Floats together = problem.solve(*kernels, four, 0, tokens);
        CHECK(std::memcmp(together.data(), alone.data(), together.size() * sizeof(float)) == 0);
      }
    }
  }
}

TEST(shared_output_is_optional_and_tokens_too) {
  ThreadPool pool(2);
  const Problem problem(3, 2, 1, 32, 4);
  const LinearKernels& kernels = *mlx_server::linear_kernels()[0];
  CHECK(problem.solve(kernels, pool, 0, 0).empty());
  const Floats without = problem.solve(kernels, pool, 0, 3, false), with = problem.solve(kernels, pool, 0, 3);
  for (std::size_t i = 0; i < with.size(); ++i) {
    CHECK_NEAR(with[i], without[i] + problem.shared[i], 1e-5 * (1 + std::abs(with[i])));
  }
}

struct Choice {
  std::vector<std::int32_t> experts;
  Floats weights;
};

Choice route(const Floats& logits, std::int64_t tokens, std::int64_t top_k, bool softmax, bool normalize) {
  ThreadPool pool(3);
  Choice choice{std::vector<std::int32_t>(static_cast<std::size_t>(tokens * top_k)),
                Floats(static_cast<std::size_t>(tokens * top_k))};
  const auto num_experts = tokens == 0 ? 1 : static_cast<std::int64_t>(logits.size()) / tokens;
  mlx_server::route(
      {logits.data(), choice.experts.data(), choice.weights.data(), tokens, num_experts, top_k, softmax, normalize},
      pool);
  return choice;
}

TEST(route_takes_the_best_lower_ids_first_among_equals) {
  const Floats logits{1, 2, 2, 0, 2, 1, 3, 3, 3, 3, 3, 3};
  for (const bool softmax : {true, false}) {
    const Choice choice = route(logits, 2, 4, softmax, true);
    CHECK(choice.experts == std::vector<std::int32_t>{1, 2, 4, 0, 0, 1, 2, 3});
    CHECK_NEAR(std::accumulate(choice.weights.begin(), choice.weights.begin() + 4, 0.0), 1, 1e-6);
    CHECK_EQ(choice.weights[4], 0.25f);
  }
  const Choice choice = route({0, std::log(3.0f)}, 1, 2, true, false);
  CHECK_NEAR(choice.weights[0], 0.75, 1e-6);
  CHECK_NEAR(choice.weights[1], 0.25, 1e-6);
  CHECK_NEAR(route({std::log(3.0f)}, 1, 1, false, false).weights[0], 0.75, 1e-6);
}

TEST(route_computes_each_token_alone) {
  std::mt19937 rng(1);
  const Floats logits = random_floats(500 * 64, rng);
  const Choice all = route(logits, 500, 8, true, true);
  for (std::size_t token = 0; token < 500; token += 7) {
    const Choice one = route({logits.begin() + 64 * token, logits.begin() + 64 * (token + 1)}, 1, 8, true, true);
    CHECK(std::equal(one.experts.begin(), one.experts.end(), all.experts.begin() + 8 * token));
    CHECK(std::equal(one.weights.begin(), one.weights.end(), all.weights.begin() + 8 * token));
  }
}

TEST(route_gives_experts_in_range_whatever_the_logits) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
  for (const float bad : {kNan, -kNan, kInfinity}) {
    const Choice choice = route({0, 1, bad, 2, 0, 1, 5, 2}, 2, 2, true, true);
    CHECK(choice.experts == std::vector<std::int32_t>{0, 1, 2, 3});
    CHECK(std::isnan(choice.weights[0]) && std::isnan(choice.weights[1]) && !std::isnan(choice.weights[2]));
  }
  CHECK(route(Floats(3, -kInfinity), 1, 2, true, false).experts == std::vector<std::int32_t>{0, 1});
  CHECK(route({0, kNan, 9}, 1, 2, false, false).experts == std::vector<std::int32_t>{1, 2});
  CHECK(route({}, 0, 1, true, false).experts.empty());
}

}  // namespace
