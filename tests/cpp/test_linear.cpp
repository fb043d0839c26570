#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "linear/linear_cpu.h"

namespace {

using mlx_server::LinearKernels;
using mlx_server::QuantizedLinear;
using mlx_server::ThreadPool;

struct Problem {
  std::int64_t rows, n, k;
  int group_size, bits;
  std::vector<float> x, scales, biases;
  std::vector<std::uint8_t> weight;

  Problem(std::int64_t rows, std::int64_t n, std::int64_t k, int group_size, int bits)
      : rows(rows), n(n), k(k), group_size(group_size), bits(bits) {
    std::mt19937 rng(static_cast<unsigned>(rows * 31 + n * 7 + k + group_size + bits));
    std::normal_distribution<float> normal;
    const auto random = [&](std::int64_t size) {
      std::vector<float> values(static_cast<std::size_t>(size));
      for (float& v : values) {
        v = normal(rng);
      }
      return values;
    };
    x = random(rows * k);
    scales = random(n * k / group_size);
    biases = random(n * k / group_size);
    weight.resize(static_cast<std::size_t>(n * k * bits / 8));
    for (std::uint8_t& byte : weight) {
      byte = static_cast<std::uint8_t>(rng());
    }
  }

  // y of rows [begin, end)
  std::vector<float> solve(const LinearKernels& kernels, ThreadPool& pool, std::int64_t begin, std::int64_t end) const {
    std::vector<float> y(static_cast<std::size_t>((end - begin) * n));
    const QuantizedLinear op{
        x.data() + begin * k, weight.data(), scales.data(), biases.data(), y.data(), end - begin, n, k,
        group_size,           bits};
    mlx_server::quantized_linear(op, pool, kernels);
    return y;
  }

  // The definition, in double; magnitude is the sum of the terms' absolute values, which bounds the rounding.
  double element(std::int64_t row, std::int64_t column, double& magnitude) const {
    double sum = magnitude = 0;
    for (std::int64_t i = 0; i < k; ++i) {
      const std::int64_t at = column * k + i;
      int q = 0;
      for (int bit = 0; bit < bits; ++bit) {
        const std::int64_t place = at * bits + bit;
        q |= (weight[place / 8] >> place % 8 & 1) << bit;
      }
      const double scaled = static_cast<double>(scales[at / group_size]) * q, bias = biases[at / group_size];
      sum += (scaled + bias) * x[row * k + i];
      magnitude += (std::abs(scaled) + std::abs(bias)) * std::abs(x[row * k + i]);
    }
    return sum;
  }
};

void check_definition(const LinearKernels& kernels, ThreadPool& pool, const Problem& problem) {
  const std::vector<float> y = problem.solve(kernels, pool, 0, problem.rows);
  for (std::int64_t row = 0; row < problem.rows; ++row) {
    for (std::int64_t column = 0; column < problem.n; ++column) {
      double magnitude;
      const double expected = problem.element(row, column, magnitude);
      CHECK_NEAR(y[row * problem.n + column], expected, 1e-6 * magnitude);
    }
  }
}

TEST(agrees_with_the_definition) {
  ThreadPool pool(3);
  for (const LinearKernels* kernels : mlx_server::linear_kernels()) {
    std::cerr << "  " << kernels->name << "\n";
    for (const int bits : {2, 3, 4, 5, 6, 8}) {
      for (const int group_size : {32, 64, 128}) {
        for (const std::int64_t rows : {1, 2, 3, 4, 7, 21}) {
          check_definition(*kernels, pool, Problem(rows, 37, 2 * group_size, group_size, bits));
          check_definition(*kernels, pool, Problem(rows, 1, 5 * group_size, group_size, bits));
        }
      }
    }
  }
}

TEST(a_row_does_not_depend_on_the_rows_beside_it) {
  ThreadPool one(1), four(4);
  for (const LinearKernels* kernels : mlx_server::linear_kernels()) {
    for (const int bits : {2, 3, 4, 5, 6, 8}) {
      const Problem problem(200, 70, 576, 32, bits);
      std::vector<float> alone;
      for (std::int64_t row = 0; row < problem.rows; ++row) {
        const std::vector<float> y = problem.solve(*kernels, one, row, row + 1);
        alone.insert(alone.end(), y.begin(), y.end());
      }
      for (const std::int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 33, 200}) {
        const std::vector<float> together = problem.solve(*kernels, four, 0, rows);
        CHECK(std::memcmp(together.data(), alone.data(), together.size() * sizeof(float)) == 0);
      }
    }
  }
}

TEST(a_tile_gathers_rows_of_x) {
  for (const LinearKernels* kernels : mlx_server::linear_kernels()) {
    for (const std::int64_t rows : {1, 3, 20}) {
      ThreadPool pool(1);
      const Problem problem(9, 37, 128, 64, 4);
      std::vector<std::int32_t> x_rows(static_cast<std::size_t>(rows));
      for (std::size_t i = 0; i < x_rows.size(); ++i) {
        x_rows[i] = static_cast<std::int32_t>(i * 5 % 9);
      }
      std::vector<float> y(static_cast<std::size_t>(rows * problem.n));
      const QuantizedLinear op{problem.x.data(),
                               problem.weight.data(),
                               problem.scales.data(),
                               problem.biases.data(),
                               y.data(),
                               rows,
                               problem.n,
                               problem.k,
                               64,
                               4,
                               x_rows.data()};
      mlx_server::quantized_linear_tile(op, *kernels);
      const std::vector<float> all = problem.solve(*kernels, pool, 0, problem.rows);
      for (std::int64_t row = 0; row < rows; ++row) {
        CHECK(std::memcmp(&y[row * problem.n], &all[x_rows[row] * problem.n], problem.n * sizeof(float)) == 0);
      }
    }
  }
}

TEST(nothing_to_compute) {
  ThreadPool pool(2);
  for (const LinearKernels* kernels : mlx_server::linear_kernels()) {
    CHECK(Problem(0, 8, 64, 32, 4).solve(*kernels, pool, 0, 0).empty());
    CHECK(Problem(3, 0, 64, 32, 4).solve(*kernels, pool, 0, 3).empty());
    CHECK(Problem(2, 2, 0, 32, 4).solve(*kernels, pool, 0, 2) == std::vector<float>(4, 0.0f));
  }
}

}  // namespace
