#include "linear/linear_gpu.h"

#include <algorithm>

#include <mlx/backend/cuda/cuda.h>
#include <mlx/ops.h>

#include "kernel_sources.h"
#include "kernels/kernel_use.h"
#include "kernels/launch.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

// Measured on CUDA, where MLX reads a matrix for each row of a few, and multiplies many at a sixth of cuBLAS's speed.
constexpr int kFewRows = 8;
constexpr int kManyRows = 128;

constexpr int kTileColumns = 32;  // of MLX's products; matrices that don't fill tiles are small, and no matter

constexpr int kThreads = 128;
constexpr int kColumns = 4;  // of a simdgroup

bool has_decode_kernel(const mx::array& x, const mx::array& scales, int group_size, int bits, const std::string& mode) {
  return mode == "affine" && x.dtype().size() == 2 && scales.dtype() == x.dtype() && x.shape(-1) % 32 == 0 &&
         group_size % 32 == 0 && bits > 1 && bits != 7 && are_enabled({"linear_decode"});
}

// Simdgroups that share a column's sum: enough work for a large GPU, but no more of them than turns for their lanes.
// It depends on the matrix alone, so that a row's result does not depend on the rows beside it.
int split(int n, int k) {
  constexpr int kWantedSimdgroups = 4096;
  int split = 1;
  while (split < kThreads / 32 && n / kColumns * split < kWantedSimdgroups && split * 1024 < k) {
    split *= 2;
  }
  return split;
}

// x [rows, K] -> [rows, N]
mx::array decode(const mx::array& x, const mx::array& weight, const mx::array& scales, const mx::array& biases,
                 int group_size, int bits, mx::Stream s) {
  const int rows = x.shape(0), k = x.shape(1), n = weight.shape(0);
  const int group_columns = kColumns * kThreads / 32 / split(n, k);
  return launch(kernel_sources::linear_decode,
                {.inputs = {x, weight, scales, biases},
                 .output_shapes = {{rows, n}},
                 .output_dtypes = {x.dtype()},
                 .constants = {{"T", x.dtype()},
                               {"BITS", bits},
                               {"GROUP_SIZE", group_size},
                               {"ROWS", rows == 1   ? 1
                                        : rows <= 4 ? 4
                                                    : 8},
                               {"COLUMNS", kColumns},
                               {"SPLIT", split(n, k)}},
                 .groups = {(n + group_columns - 1) / group_columns, 1, 1},
                 .threads = kThreads},
                s)[0];
}

}  // namespace

mx::array quantized_linear_gpu(const mx::array& x, const mx::array& weight, const mx::array& scales,
                               const std::optional<mx::array>& biases, int group_size, int bits,
                               const std::string& mode, mx::Stream s) {
  if (x.size() == 0 || weight.size() == 0) {  // MLX's CUDA kernels divide by the number of rows
    mx::Shape shape = x.shape();
    shape.back() = weight.shape(0);
    return mx::zeros(shape, x.dtype(), s);
  }
  const int k = x.shape(-1), n = weight.shape(0), rows = static_cast<int>(x.size() / k);
  if (!mx::cu::is_available()) {
    return mx::quantized_matmul(x, weight, scales, biases, /*transpose=*/true, group_size, bits, mode, s);
  }
  const mx::array flat = mx::reshape(x, {rows, k}, s);
  const auto multiply = [&] {
    if (rows <= kFewRows && has_decode_kernel(x, scales, group_size, bits, mode)) {
      return decode(flat, weight, scales, *biases, group_size, bits, s);
    }
    if ((rows >= kManyRows && x.dtype().size() == 2) || n % kTileColumns != 0) {
      const auto dense = mx::dequantize(weight, scales, biases, group_size, bits, mode, std::nullopt, x.dtype(), s);
      return mx::matmul(flat, mx::transpose(dense, s), s);
    }
    return mx::quantized_matmul(flat, weight, scales, biases, /*transpose=*/true, group_size, bits, mode, s);
  };
  mx::Shape shape = x.shape();
  shape.back() = n;
  return mx::reshape(multiply(), shape, s);
}

}  // namespace mlx_server
