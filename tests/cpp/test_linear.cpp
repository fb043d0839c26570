#include <cmath>
#include <cstdint>
#include <iterator>
#include <random>
#include <vector>

#include "check.h"
#include "linear/linear_cpu.h"

namespace {

using mlx_server::LinearKernels;
using mlx_server::LinearWeights;
using mlx_server::ThreadPool;

struct Form {
  int group_size, bits;
  bool is_float = false;
};

constexpr Form kFloatForms[] = {{32, 4, true}, {32, 8, true}, {16, 4, true}};  // mxfp4, mxfp8, nvfp4

// The value of a floating point number of so many bits of exponent and mantissa, the sign above them.
double float_value(int code, int exponent_bits, int mantissa_bits) {
  const int mantissa = code & ((1 << mantissa_bits) - 1), exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double value = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                     : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  return code >> (exponent_bits + mantissa_bits) & 1 ? -value : value;
}

struct Problem {
  std::int64_t rows, n, k;
  int group_size, bits;
  bool is_float;
  std::vector<float> x, scales, biases;
  std::vector<std::uint8_t> weight, scale_codes;

  Problem(std::int64_t rows, std::int64_t n, std::int64_t k, int group_size, int bits)
      : Problem(rows, n, k, Form{group_size, bits}) {}
  Problem(std::int64_t rows, std::int64_t n, std::int64_t k, Form form)
      : rows(rows), n(n), k(k), group_size(form.group_size), bits(form.bits), is_float(form.is_float) {
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
    for (std::int64_t i = 0; is_float && i < n * k / group_size; ++i) {  // scales about 1; e4m3 with signs too
      scale_codes.push_back(static_cast<std::uint8_t>(group_size == 16 ? rng() % 256 & 0xbf : 120 + rng() % 10));
    }
  }

  LinearWeights weights() const {
    return {.weight = weight.data(),
            .scales = is_float ? nullptr : scales.data(),
            .biases = is_float ? nullptr : biases.data(),
            .n = n,
            .k = k,
            .group_size = group_size,
            .bits = bits,
            .scale_codes = is_float ? scale_codes.data() : nullptr};
  }

  // y of rows [begin, end)
  std::vector<float> solve(const LinearKernels& kernels, ThreadPool& pool, std::int64_t begin, std::int64_t end) const {
    std::vector<float> y(static_cast<std::size_t>((end - begin) * n));
    mlx_server::quantized_linear({x.data() + begin * k, weights(), y.data(), end - begin}, pool, kernels);
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
      double scaled, bias = 0;
      if (is_float) {
        const int code = scale_codes[at / group_size];
        scaled = (bits == 4 ? float_value(q, 2, 1) : float_value(q, 4, 3)) *
                 (group_size == 16 ? float_value(code, 4, 3) : std::ldexp(1.0, code - 127));
      } else {
        scaled = static_cast<double>(scales[at / group_size]) * q, bias = biases[at / group_size];
      }
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
        for (const std::int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 21}) {
          check_definition(*kernels, pool, Problem(rows, 37, 2 * group_size, group_size, bits));
          check_definition(*kernels, pool, Problem(rows, 1, 5 * group_size, group_size, bits));
        }
      }
    }
  }
}

TEST(floating_point_weights_agree_with_the_definition) {
  ThreadPool pool(3);
  for (const LinearKernels* kernels : mlx_server::linear_kernels()) {
    for (const Form form : kFloatForms) {
      for (const std::int64_t rows : {1, 2, 5, 6, 8, 21}) {
        check_definition(*kernels, pool, Problem(rows, 37, 64, form));
        check_definition(*kernels, pool, Problem(rows, 1, 160, form));
      }
    }
  }
}

TEST(plain_weights_agree_with_the_definition) {
  ThreadPool pool(3);
  for (const LinearKernels* kernels : mlx_server::linear_kernels()) {
    for (const std::int64_t rows : {1, 3, 20}) {
      const Problem p(rows, 37, 96, 32, 8);
      std::vector<float> weight(37 * 96), y(static_cast<std::size_t>(rows * 37));
      for (std::size_t i = 0; i < weight.size(); ++i) {
        weight[i] = static_cast<float>(p.weight[i]) - 100;
      }
      const LinearWeights w{
          reinterpret_cast<const std::uint8_t*>(weight.data()), nullptr, nullptr, p.n, p.k, /*group_size=*/0, 32};
      mlx_server::quantized_linear({p.x.data(), w, y.data(), rows}, pool, *kernels);
      for (std::int64_t i = 0; i < rows * p.n; ++i) {
        double sum = 0, magnitude = 0;
        for (std::int64_t j = 0; j < p.k; ++j) {
          const double term = static_cast<double>(p.x[i / p.n * p.k + j]) * weight[i % p.n * p.k + j];
          sum += term;
          magnitude += std::abs(term);
        }
        CHECK_NEAR(y[i], sum, 1e-6 * magnitude);
      }
    }
  }
}

TEST(a_row_does_not_depend_on_the_rows_beside_it) {
  ThreadPool one(1), four(4);
  for (const LinearKernels* kernels : mlx_server::linear_kernels()) {
    std::vector<Form> forms(std::begin(kFloatForms), std::end(kFloatForms));
    for (const int bits : {2, 3, 4, 5, 6, 8}) {
      forms.push_back({32, bits});
    }
    for (const Form form : forms) {
      const Problem problem(200, 70, 576, form);
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
      mlx_server::quantized_linear_tile({problem.x.data(), problem.weights(), y.data(), rows, x_rows.data()}, *kernels);
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
