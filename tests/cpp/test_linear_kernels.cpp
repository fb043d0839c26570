// The portable kernels of linear layers, against the definition in double precision.
#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "check.h"
#include "kernels/host.h"
#include "random_matrix.h"

namespace {

using mlx_server::HostBfloat16, mlx_server::is_row, mlx_server::Matrix, mlx_server::random, mlx_server::row_of,
    mlx_server::Word;

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
  mlx_server::host_launch({(n + kGroupColumns - 1) / kGroupColumns, (rows + ROWS - 1) / ROWS, 1}, kThreads, [&] {
    decode_kernel<T, BITS, GROUP_SIZE, ROWS, kColumns, SPLIT, kThreads>(x.data(), x_shape.data(), matrix.words.data(),
                                                                        weight_shape.data(), matrix.scales.data(),
                                                                        matrix.biases.data(), y.data());
  });
  return y;
}

// y [rows, N] is x [rows, K] by the matrix.
template <typename T, int BITS>
void check_product(const std::vector<T>& y, const Matrix<T, BITS>& matrix, const std::vector<T>& x, int rows,
                   double tolerance) {
  const int n = matrix.shape[1], k = static_cast<int>(x.size()) / rows;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < n; ++c) {
      const double expected = matrix.multiply(0, c, k, x.data() + r * k);
      CHECK_NEAR(static_cast<double>(y[static_cast<std::size_t>(r * n + c)]), expected,
                 tolerance * std::max(1.0, std::abs(expected)));
    }
  }
}

template <typename T, int BITS, int GROUP_SIZE, int ROWS, int SPLIT>
void check(int rows, int n, int k, double tolerance) {
  const Matrix<T, BITS> matrix(1, n, k, GROUP_SIZE);
  const auto x = random<T>(rows * k);
  const auto y = multiply<T, BITS, GROUP_SIZE, ROWS, SPLIT>(x, rows, k, matrix);
  check_product(y, matrix, x, rows, tolerance);
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
  check<float, 4, 32, 4, 2>(9, 6, 96, 1e-5);
  check<float, 4, 64, 8, 1>(17, 18, 64, 1e-5);
  check<HostBfloat16, 4, 64, 4, 2>(3, 12, 256, 1e-2);
  check<HostBfloat16, 8, 64, 1, 4>(1, 12, 2112, 1e-2);
}

TEST(a_row_does_not_depend_on_the_rows_beside_it) {
  constexpr int kRows = 20, kColumns = 6, kDim = 1184;
  const Matrix<float, 4> matrix(1, kColumns, kDim, 32);
  const auto x = random<float>(kRows * kDim);
  const auto together = multiply<float, 4, 32, 8, 2>(x, kRows, kDim, matrix);
  for (int r = 0; r < kRows; ++r) {
    CHECK(is_row(multiply<float, 4, 32, 1, 2>(row_of(x, r, kDim), 1, kDim, matrix), together, r, kColumns));
  }
}

template <typename T, int ROWS, int COLUMNS, int SPLIT, int THREADS>
void dense_kernel(const T* x, const int* x_shape, const T* weight, const int* weight_shape, T* y) {
#include "linear/linear_dense.kernel"
}

template <typename T, int ROWS, int SPLIT>
std::vector<T> multiply_dense(const std::vector<T>& x, int rows, int k, const std::vector<T>& weight) {
  constexpr int kColumns = 4, kThreads = 128, kGroupColumns = kColumns * kThreads / 32 / SPLIT;
  const int n = static_cast<int>(weight.size()) / k;
  const std::array<int, 2> x_shape{rows, k}, weight_shape{n, k};
  std::vector<T> y(static_cast<std::size_t>(rows * n));
  mlx_server::host_launch({(n + kGroupColumns - 1) / kGroupColumns, (rows + ROWS - 1) / ROWS, 1}, kThreads, [&] {
    dense_kernel<T, ROWS, kColumns, SPLIT, kThreads>(x.data(), x_shape.data(), weight.data(), weight_shape.data(),
                                                     y.data());
  });
  return y;
}

template <typename T, int ROWS, int SPLIT>
void check_dense(int rows, int n, int k, double tolerance) {
  const auto weight = random<T>(n * k), x = random<T>(rows * k);
  const auto y = multiply_dense<T, ROWS, SPLIT>(x, rows, k, weight);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < n; ++c) {
      double expected = 0;
      for (int i = 0; i < k; ++i) {
        expected += static_cast<double>(x[static_cast<std::size_t>(r * k + i)]) *
                    static_cast<double>(weight[static_cast<std::size_t>(c * k + i)]);
      }
      CHECK_NEAR(static_cast<double>(y[static_cast<std::size_t>(r * n + c)]), expected,
                 tolerance * std::max(1.0, std::abs(expected)));
    }
  }
}

TEST(dense_agrees_with_the_definition) {
  check_dense<float, 1, 1>(1, 21, 8, 1e-5);
  check_dense<float, 4, 2>(3, 1, 1200, 1e-5);
  check_dense<float, 8, 4>(20, 5, 1048, 3e-5);
  check_dense<HostBfloat16, 4, 1>(9, 18, 264, 2e-2);
}

TEST(a_row_of_dense_does_not_depend_on_the_rows_beside_it) {
  constexpr int kRows = 20, kColumns = 6, kDim = 1184;
  const auto weight = random<HostBfloat16>(kColumns * kDim), x = random<HostBfloat16>(kRows * kDim);
  const auto together = multiply_dense<HostBfloat16, 8, 2>(x, kRows, kDim, weight);
  for (int r = 0; r < kRows; ++r) {
    const auto alone = multiply_dense<HostBfloat16, 1, 2>(row_of(x, r, kDim), 1, kDim, weight);
    CHECK(is_row(alone, together, r, kColumns));
  }
}

template <typename T, int BITS, int GROUP_SIZE, int ONES, int TILES, int THREADS>
void skinny_kernel(const T* x, const int* x_shape, const Word<T, BITS>* weight, const int* weight_shape,
                   const T* scales, const T* biases, T* y) {
#include "linear/linear_skinny.kernel"
}

template <int BITS, int GROUP_SIZE, int TILES, int THREADS>
void check_skinny(int rows, int n, int k, double tolerance) {
  using T = HostBfloat16;
  constexpr int kColumns = 16 * TILES;
  const Matrix<T, BITS> matrix(1, n, k, GROUP_SIZE);
  const auto x = random<T>(rows * k);
  const std::array<int, 2> x_shape{rows, k}, weight_shape{n, matrix.shape[2]};
  std::vector<T> y(static_cast<std::size_t>(rows * n));
  mlx_server::host_launch({(n + kColumns - 1) / kColumns, (rows + 15) / 16, 1}, THREADS, [&] {
    skinny_kernel<T, BITS, GROUP_SIZE, 0x4300, TILES, THREADS>(x.data(), x_shape.data(), matrix.words.data(),
                                                               weight_shape.data(), matrix.scales_data(),
                                                               matrix.biases_data(), y.data());
  });
  check_product(y, matrix, x, rows, tolerance);
}

TEST(skinny_agrees_with_the_definition) {
  check_skinny<4, 64, 1, 224>(1, 37, 1216, 5e-2);
  check_skinny<4, 32, 2, 128>(5, 70, 96, 5e-2);  // one chunk, not whole
  check_skinny<4, 128, 2, 64>(37, 33, 640, 5e-2);
  check_skinny<2, 32, 1, 64>(3, 20, 224, 5e-2);
  check_skinny<3, 64, 2, 64>(16, 20, 320, 5e-2);
  check_skinny<5, 64, 1, 64>(2, 9, 192, 5e-2);
  check_skinny<6, 32, 1, 64>(2, 9, 160, 5e-2);
  check_skinny<8, 64, 1, 64>(17, 9, 256, 5e-2);
}

template <typename T, int BITS, int GROUP_SIZE, int ROWS, int PARTS, int GROUP_PARTS, int THREADS>
void matrix_kernel(const T* x, const int* x_shape, const Word<T, BITS == 16 ? 32 : BITS>* weight,
                   const int* weight_shape, const T* scales, const T* biases, T* y, float* parts) {
#include "linear/linear_matrix.kernel"
}

template <typename T, int THREADS>
void join_kernel(const float* parts, const int* parts_shape, T* y) {
#include "linear/linear_join.kernel"
}

// BITS 16: a plain matrix, BITS 32 of `Matrix`.
template <typename T, int BITS, int GROUP_SIZE, int ROWS, int PARTS, int GROUP_PARTS>
std::vector<T> multiply_matrix(const std::vector<T>& x, int rows, int k,
                               const Matrix<T, BITS == 16 ? 32 : BITS>& matrix) {
  constexpr int kThreads = 128, kGroupColumns = kThreads / 2;
  const int n = matrix.shape[1], size = rows * n;
  const std::array<int, 2> x_shape{rows, k}, weight_shape{n, matrix.shape[2]}, parts_shape{PARTS, size};
  std::vector<T> y(static_cast<std::size_t>(size));
  std::vector<float> parts(static_cast<std::size_t>(PARTS * size));
  const std::array<int, 3> groups{(n + kGroupColumns - 1) / kGroupColumns, (rows + ROWS - 1) / ROWS,
                                  PARTS / GROUP_PARTS};
  mlx_server::host_launch(groups, kThreads, [&] {
    matrix_kernel<T, BITS, GROUP_SIZE, ROWS, PARTS, GROUP_PARTS, kThreads>(
        x.data(), x_shape.data(), matrix.words.data(), weight_shape.data(), matrix.scales_data(), matrix.biases_data(),
        y.data(), parts.data());
  });
  if (GROUP_PARTS < PARTS) {
    mlx_server::host_launch({(size + kThreads - 1) / kThreads, 1, 1}, kThreads,
                            [&] { join_kernel<T, kThreads>(parts.data(), parts_shape.data(), y.data()); });
  }
  return y;
}

template <typename T, int BITS, int GROUP_SIZE, int ROWS, int PARTS, int GROUP_PARTS>
void check_matrix(int rows, int n, int k, double tolerance) {
  const Matrix<T, BITS == 16 ? 32 : BITS> matrix(1, n, k, GROUP_SIZE);
  const auto x = random<T>(rows * k);
  const auto y = multiply_matrix<T, BITS, GROUP_SIZE, ROWS, PARTS, GROUP_PARTS>(x, rows, k, matrix);
  check_product(y, matrix, x, rows, tolerance);
}

TEST(matrix_agrees_with_the_definition) {
  check_matrix<float, 4, 64, 16, 1, 1>(1, 70, 128, 1e-5);
  check_matrix<float, 4, 32, 16, 2, 1>(17, 9, 224, 1e-5);
  check_matrix<float, 2, 32, 16, 4, 1>(2, 9, 96, 1e-5);  // some parts are empty
  check_matrix<float, 3, 32, 16, 2, 2>(2, 9, 160, 1e-5);
  check_matrix<float, 5, 64, 16, 1, 1>(2, 9, 192, 1e-5);
  check_matrix<float, 6, 64, 32, 2, 2>(33, 9, 192, 1e-5);
  check_matrix<float, 8, 128, 16, 1, 1>(3, 9, 384, 1e-5);
  check_matrix<float, 16, 32, 16, 2, 1>(3, 70, 160, 1e-5);
  check_matrix<HostBfloat16, 4, 64, 16, 1, 1>(3, 12, 256, 3e-2);
  check_matrix<HostBfloat16, 16, 32, 64, 2, 2>(65, 12, 96, 3e-2);
}

TEST(a_row_of_matrix_does_not_depend_on_the_rows_beside_it) {
  constexpr int kRows = 20, kColumns = 6, kDim = 352;
  const Matrix<HostBfloat16, 4> matrix(1, kColumns, kDim, 32);
  const auto x = random<HostBfloat16>(kRows * kDim);
  const auto together = multiply_matrix<HostBfloat16, 4, 32, 32, 4, 4>(x, kRows, kDim, matrix);
  for (const int r : {0, 15, 16, kRows - 1}) {
    const auto row = row_of(x, r, kDim);
    CHECK(is_row(multiply_matrix<HostBfloat16, 4, 32, 16, 4, 1>(row, 1, kDim, matrix), together, r, kColumns));
  }
}

}  // namespace
