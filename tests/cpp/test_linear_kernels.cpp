// The portable kernel of linear layers, against the definition in double precision.
#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "check.h"
#include "kernels/host.h"
#include "random_matrix.h"

namespace {

using mlx_server::HostBfloat16, mlx_server::Matrix, mlx_server::random;

template <typename T, int BITS, int GROUP_SIZE, int ROWS, int COLUMNS, int SPLIT, int THREADS>
void decode_kernel(const T* x, const int* x_shape, const std::uint32_t* weight, const int* weight_shape,
                   const T* scales, const T* biases, T* y) {
#include "linear/linear_decode.kernel"
}

template <typename T, int BITS, int GROUP_SIZE, int ROWS, int SPLIT>
std::vector<T> multiply(const std::vector<T>& x, int rows, int k, const Matrix<T, BITS>& matrix) {
  constexpr int kColumns = 4, kThreads = 128, kGroupColumns = kColumns * kThreads / 32 / SPLIT;
  const int n = matrix.shape[1];
  const std::array<int, 2> x_shape{rows, k}, weight_shape{n, matrix.shape[2]};
  std::vector<T> y(static_cast<std::size_t>(rows * n));
  mlx_server::host_launch({(n + kGroupColumns - 1) / kGroupColumns, 1, 1}, kThreads, [&] {
    decode_kernel<T, BITS, GROUP_SIZE, ROWS, kColumns, SPLIT, kThreads>(x.data(), x_shape.data(), matrix.words.data(),
                                                                        weight_shape.data(), matrix.scales.data(),
                                                                        matrix.biases.data(), y.data());
  });
  return y;
}

template <typename T, int BITS, int GROUP_SIZE, int ROWS, int SPLIT>
void check(int rows, int n, int k, double tolerance) {
  const Matrix<T, BITS> matrix(1, n, k, GROUP_SIZE);
  const auto x = random<T>(rows * k);
  const auto y = multiply<T, BITS, GROUP_SIZE, ROWS, SPLIT>(x, rows, k, matrix);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < n; ++c) {
      const double expected = matrix.multiply(0, c, k, x.data() + r * k);
      CHECK_NEAR(static_cast<double>(y[static_cast<std::size_t>(r * n + c)]), expected,
                 tolerance * std::max(1.0, std::abs(expected)));
    }
  }
}

TEST(decode_agrees_with_the_definition) {
  check<float, 4, 64, 1, 1>(1, 21, 128, 1e-5);
  check<float, 4, 32, 4, 2>(3, 8, 96, 1e-5);
  check<float, 4, 128, 8, 4>(8, 5, 2304, 3e-5);
  check<float, 2, 32, 1, 4>(1, 9, 64, 1e-5);
  check<float, 3, 32, 4, 1>(4, 9, 64, 1e-5);
  check<float, 5, 64, 4, 2>(2, 9, 192, 1e-5);
  check<float, 6, 64, 1, 2>(1, 9, 192, 1e-5);
  check<float, 8, 32, 8, 1>(5, 9, 160, 1e-5);
  check<HostBfloat16, 4, 64, 4, 2>(3, 12, 256, 1e-2);
  check<HostBfloat16, 8, 64, 1, 4>(1, 12, 2112, 1e-2);
}

TEST(a_row_does_not_depend_on_the_rows_beside_it) {
  constexpr int kRows = 8, kColumns = 6, kDim = 1184;
  const Matrix<float, 4> matrix(1, kColumns, kDim, 32);
  const auto x = random<float>(kRows * kDim);
  const auto together = multiply<float, 4, 32, 8, 2>(x, kRows, kDim, matrix);
  for (int r = 0; r < kRows; ++r) {
    const std::vector<float> row(x.begin() + r * kDim, x.begin() + (r + 1) * kDim);
    const auto alone = multiply<float, 4, 32, 1, 2>(row, 1, kDim, matrix);
    CHECK(std::equal(alone.begin(), alone.end(), together.begin() + r * kColumns));
  }
}

}  // namespace
