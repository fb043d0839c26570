// Random matrices as GPU kernels read them, and rows of their products.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <random>
#include <type_traits>
#include <vector>

namespace mlx_server {

// A word of a matrix in BITS bits; of a plain one (BITS 32), whose numbers are T like those of x.
template <typename T, int BITS>
using Word = std::conditional_t<BITS == 32, T, std::uint32_t>;

inline std::mt19937 rng(7);

template <typename T>
std::vector<T> random(int size, float spread = 1) {
  std::normal_distribution<float> normal(0, spread);
  std::vector<T> values(static_cast<std::size_t>(size));
  for (T& v : values) {
    v = T(normal(rng));
  }
  return values;
}

// The matrices [rows, columns] of all experts.
template <typename T, int BITS>
struct Matrix {
  std::array<int, 3> shape, scales_shape;
  std::vector<Word<T, BITS>> words;
  std::vector<T> scales, biases;
  std::vector<double> values;

  Matrix(int num_experts, int rows, int columns, int group_size)
      : shape{num_experts, rows, BITS == 32 ? columns : columns * BITS / 32},
        scales_shape{num_experts, rows, columns / group_size} {
    const auto size = static_cast<std::size_t>(num_experts * rows * columns);
    if constexpr (BITS == 32) {
      words = random<T>(static_cast<int>(size), 0.2f);
      values.assign(words.begin(), words.end());
      scales_shape = shape;
    } else {
      scales = random<T>(num_experts * rows * columns / group_size, 0.2f / (1 << BITS));
      biases = random<T>(num_experts * rows * columns / group_size, 0.2f);
      words.resize(size * BITS / 32);
      for (std::size_t i = 0; i < size; ++i) {
        const std::uint32_t q = rng() >> 16 & ((1u << BITS) - 1);
        const std::size_t bit = i * BITS, group = i / static_cast<std::size_t>(group_size);
        words[bit / 32] |= q << bit % 32;
        if (bit % 32 + BITS > 32) {
          words[bit / 32 + 1] |= q >> (32 - bit % 32);
        }
        values.push_back(static_cast<double>(static_cast<float>(scales[group])) * q +
                         static_cast<double>(static_cast<float>(biases[group])));
      }
    }
  }

  const T* scales_data() const { return scales.empty() ? reinterpret_cast<const T*>(words.data()) : scales.data(); }
  const T* biases_data() const { return biases.empty() ? reinterpret_cast<const T*>(words.data()) : biases.data(); }

  template <typename X>
  double multiply(int expert, int row, int columns, const X* x) const {
    double sum = 0;
    for (int i = 0; i < columns; ++i) {
      sum += values[static_cast<std::size_t>((expert * shape[1] + row) * columns + i)] * static_cast<double>(x[i]);
    }
    return sum;
  }
};

// Row r of `together`, of n columns, is `alone`.
template <typename T>
bool is_row(const std::vector<T>& alone, const std::vector<T>& together, int r, int n) {
  return std::equal(alone.begin(), alone.end(), together.begin() + r * n,
                    [](T a, T b) { return static_cast<float>(a) == static_cast<float>(b); });
}

template <typename T>
std::vector<T> row_of(const std::vector<T>& x, int r, int k) {
  return {x.begin() + r * k, x.begin() + (r + 1) * k};
}

}  // namespace mlx_server
