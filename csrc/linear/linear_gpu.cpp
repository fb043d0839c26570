#include "linear/linear_gpu.h"

#include <utility>
#include <vector>

#include <mlx/ops.h>

#include "kernel_sources.h"
#include "kernels/kernel_use.h"
#include "kernels/launch.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr int kSkinnyRows = 16;  // a tile of linear_skinny: up to here it is faster than linear_matrix
constexpr int kManyRows = 65;    // more than a tile of linear_matrix: from here on cuBLAS is worth a dequantized matrix

constexpr int kThreads = 128;
constexpr int kColumns = 4;    // of a simdgroup
constexpr int kTileRows = 8;   // of our kernels
constexpr int kDenseUnit = 8;  // of K, what a lane of linear_dense takes at a time

// Whether our kernels can read such weights.
bool has_kernels(const mx::array& x, const mx::array& scales, int group_size, int bits, const std::string& mode) {
  return mode == "affine" && x.dtype().size() == 2 && scales.dtype() == x.dtype() && x.shape(-1) % 32 == 0 &&
         group_size % 32 == 0 && bits > 1 && bits != 7 && scales.size() >= 8;
}

// Simdgroups that share a column's sum: enough work for a large GPU, but no more of them than turns for their lanes,
// each for `turn` elements of K. It depends on the matrix alone, so that a row's result does not depend on the rows
// beside it.
int split(int n, int k, int turn) {
  constexpr int kWantedSimdgroups = 4096;
  int split = 1;
  while (split < kThreads / 32 && n / kColumns * split < kWantedSimdgroups && split * 32 * turn < k) {
    split *= 2;
  }
  return split;
}

constexpr int kMatrixColumns = kThreads / 2;  // of a group of linear_matrix

bool has_matrix_kernel() { return has_matrix_units() && are_enabled({"linear_matrix", "linear_join"}); }

// Into which a column's sum is cut, as `split`: each of 256 elements at least.
int parts(int n, int k) {
  constexpr int kWantedGroups = 1024, kMaxParts = 16;
  int parts = 1;
  while (parts < kMaxParts && n / kMatrixColumns * parts < kWantedGroups && 2 * parts * 256 <= k) {
    parts *= 2;
  }
  return parts;
}

// x [rows, K], weight [N, K] of `bits`, 16 if it is plain and stands for scales and biases -> [rows, N]
mx::array matrix(const mx::array& x, const mx::array& weight, const mx::array& scales, const mx::array& biases,
                 int group_size, int bits, mx::Stream s) {
  constexpr int kEnoughGroups = 512;  // without cutting sums into parts of several groups
  const int rows = x.shape(0), n = weight.shape(0), num_parts = parts(n, x.shape(1));
  const int tile_rows = rows <= 16 ? 16 : rows <= 32 ? 32 : 64;
  const int columns = (n + kMatrixColumns - 1) / kMatrixColumns, tiles = (rows + tile_rows - 1) / tile_rows;
  const bool is_cut = num_parts > 1 && columns * tiles < kEnoughGroups;
  const auto out = launch(kernel_sources::linear_matrix,
                          {.inputs = {x, weight, scales, biases},
                           .output_shapes = {is_cut ? mx::Shape{1} : mx::Shape{rows, n},
                                             is_cut ? mx::Shape{num_parts, rows * n} : mx::Shape{1}},
                           .output_dtypes = {x.dtype(), mx::float32},
                           .constants = {{"T", x.dtype()},
                                         {"BITS", bits},
                                         {"GROUP_SIZE", group_size},
                                         {"ROWS", tile_rows},
                                         {"PARTS", num_parts},
                                         {"GROUP_PARTS", is_cut ? 1 : num_parts}},
                           .groups = {columns, tiles, is_cut ? num_parts : 1},
                           .threads = kThreads},
                          s);
  if (!is_cut) {
    return out[0];
  }
  const auto y = launch(kernel_sources::linear_join,
                        {.inputs = {out[1]},
                         .output_shapes = {{rows, n}},
                         .output_dtypes = {x.dtype()},
                         .constants = {{"T", x.dtype()}},
                         .groups = {(rows * n + kThreads - 1) / kThreads, 1, 1},
                         .threads = kThreads},
                        s);
  return y[0];
}

bool has_skinny_kernel() { return has_matrix_units() && are_enabled({"linear_skinny"}); }

// x [rows, K], as many as kSkinnyRows -> [rows, N]
mx::array skinny(const mx::array& x, const mx::array& weight, const mx::array& scales, const mx::array& biases,
                 int group_size, int bits, mx::Stream s) {
  // Many columns are work enough for a GPU without many simdgroups for each. Shared memory holds seven.
  constexpr int kManyColumns = 16384;
  const int n = weight.shape(0), tiles = n >= kManyColumns ? 2 : 1, columns = 16 * tiles;
  return launch(kernel_sources::linear_skinny,
                {.inputs = {x, weight, scales, biases},
                 .output_shapes = {{x.shape(0), n}},
                 .output_dtypes = {x.dtype()},
                 .constants = {{"T", x.dtype()},
                               {"BITS", bits},
                               {"GROUP_SIZE", group_size},
                               {"ONES", x.dtype() == mx::bfloat16 ? 0x4300 : 0x6400},  // 128 and 1024
                               {"TILES", tiles}},
                 .groups = {(n + columns - 1) / columns, 1, 1},
                 .threads = tiles == 1 ? 7 * 32 : 4 * 32},
                s)[0];
}

// linear_decode or linear_dense: x [rows, K] -> [rows, N]
mx::array multiply(const KernelSource& kernel, std::vector<mx::array> inputs, int split,
                   std::vector<std::pair<std::string, mx::fast::TemplateArg>> constants, mx::Stream s) {
  const int rows = inputs[0].shape(0), n = inputs[1].shape(0), group_columns = kColumns * kThreads / 32 / split;
  const int tile_rows = rows == 1 ? 1 : rows <= 4 ? 4 : kTileRows;
  const mx::Dtype dtype = inputs[0].dtype();
  constants.insert(constants.end(), {{"T", dtype}, {"ROWS", tile_rows}, {"COLUMNS", kColumns}, {"SPLIT", split}});
  return launch(kernel,
                {.inputs = std::move(inputs),
                 .output_shapes = {{rows, n}},
                 .output_dtypes = {dtype},
                 .constants = std::move(constants),
                 .groups = {(n + group_columns - 1) / group_columns, (rows + tile_rows - 1) / tile_rows, 1},
                 .threads = kThreads},
                s)[0];
}

// x [rows, K] -> [rows, N]
mx::array decode(const mx::array& x, const mx::array& weight, const mx::array& scales, const mx::array& biases,
                 int group_size, int bits, mx::Stream s) {
  return multiply(kernel_sources::linear_decode, {x, weight, scales, biases}, split(weight.shape(0), x.shape(1), 32),
                  {{"BITS", bits}, {"GROUP_SIZE", group_size}}, s);
}

// a [M, K] with zeros up to a multiple of kDenseUnit columns
mx::array whole_units(const mx::array& a, mx::Stream s) {
  const int missing = (kDenseUnit - a.shape(1) % kDenseUnit) % kDenseUnit;
  return missing == 0 ? a : mx::pad(a, {{0, 0}, {0, missing}}, mx::array(0, a.dtype()), "constant", s);
}

// x [rows, K], weight [N, K], of one dtype -> [rows, N]
mx::array dense(const mx::array& x, const mx::array& weight, mx::Stream s) {
  if (x.dtype().size() == 2 && x.shape(1) % 32 == 0 && has_matrix_kernel()) {
    return matrix(x, weight, weight, weight, /*group_size=*/32, /*bits=*/16, s);
  }
  return multiply(kernel_sources::linear_dense, {whole_units(x, s), whole_units(weight, s)},
                  split(weight.shape(0), x.shape(1), kDenseUnit), {}, s);
}

bool is_empty(const mx::array& x, const mx::array& weight) { return x.size() == 0 || weight.size() == 0; }

mx::Shape output_shape(const mx::array& x, int n) {
  mx::Shape shape = x.shape();
  shape.back() = n;
  return shape;
}

mx::array flatten_rows(const mx::array& x, mx::Stream s) {
  const int k = x.shape(-1);
  return mx::reshape(x, {static_cast<int>(x.size() / k), k}, s);
}

}  // namespace

mx::array linear_gpu(const mx::array& x, const mx::array& weight, mx::Stream s) {
  if (!is_batch_invariant() || is_empty(x, weight)) {
    return mx::matmul(x, mx::transpose(weight, s), s);
  }
  const mx::Dtype dtype = mx::promote_types(x.dtype(), weight.dtype());
  const mx::array y = dense(mx::astype(flatten_rows(x, s), dtype, s), mx::astype(weight, dtype, s), s);
  return mx::reshape(y, output_shape(x, weight.shape(0)), s);
}

mx::array quantized_linear_gpu(const mx::array& x, const mx::array& weight, const mx::array& scales,
                               const std::optional<mx::array>& biases, int group_size, int bits,
                               const std::string& mode, mx::Stream s) {
  const int n = weight.shape(0);
  if (is_empty(x, weight)) {  // MLX's CUDA kernels divide by the number of rows
    return mx::zeros(output_shape(x, n), x.dtype(), s);
  }
  if (!is_batch_invariant() && !is_cuda()) {
    return mx::quantized_matmul(x, weight, scales, biases, /*transpose=*/true, group_size, bits, mode, s);
  }
  const mx::array flat = flatten_rows(x, s);
  const int rows = flat.shape(0);
  const auto dequantized = [&] {
    return mx::dequantize(weight, scales, biases, group_size, bits, mode, std::nullopt, x.dtype(), s);
  };
  const auto compute = [&] {
    const bool is_readable = has_kernels(x, scales, group_size, bits, mode);
    if (is_batch_invariant() && is_readable && has_matrix_kernel()) {
      return matrix(flat, weight, scales, *biases, group_size, bits, s);
    }
    if (rows <= kSkinnyRows && !is_batch_invariant() && is_readable && has_skinny_kernel()) {
      return skinny(flat, weight, scales, *biases, group_size, bits, s);
    }
    if ((rows <= kTileRows || is_batch_invariant()) && is_readable && are_enabled({"linear_decode"})) {
      return decode(flat, weight, scales, *biases, group_size, bits, s);
    }
    if (is_batch_invariant()) {
      return dense(flat, dequantized(), s);
    }
    if (rows < kManyRows && is_readable && has_matrix_kernel()) {
      return matrix(flat, weight, scales, *biases, group_size, bits, s);
    }
    // For more rows MLX compiles a kernel, which takes half a minute or more.
    if (rows == 1 || (rows < kTileRows && mode != "affine")) {
      return mx::quantized_matmul(flat, weight, scales, biases, /*transpose=*/true, group_size, bits, mode, s);
    }
    return mx::matmul(flat, mx::transpose(dequantized(), s), s);
  };
  return mx::reshape(compute(), output_shape(x, n), s);
}

}  // namespace mlx_server
