#include <mlx/backend/cuda/cuda.h>
#include <mlx/backend/metal/metal.h>
#include <mlx/ops.h>

#include "elementwise/elementwise.h"
#include "moe/moe_gpu.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr int kMinSortedRows = 64;  // from here on reading each expert once pays for the sort

// x [R, 1, K] of which row tokens[i] (row i where there are none) meets experts[i]  ->  [experts, 1, N]
mx::array expert_linear(mx::array x, std::optional<mx::array> tokens, const ExpertMatrix& matrix,
                        const mx::array& experts, bool sorted, mx::Stream s) {
  const bool is_gpu = s.device == mx::Device::gpu;
  const bool has_gather_mm = !is_gpu || !mx::cu::is_available();  // it is wrong on CUDA
  if (tokens && ((is_gpu && mx::metal::is_available()) || (!matrix.scales && !has_gather_mm))) {
    x = mx::take(x, *tokens, 0, s);  // Metal's kernels for sorted rows want them side by side
    tokens = std::nullopt;
  }
  if (!matrix.scales && !has_gather_mm) {
    return mx::matmul(x, mx::swapaxes(mx::take(matrix.weight, experts, 0, s), -1, -2, s), s);
  }
  if (!matrix.scales) {
    return mx::gather_mm(x, mx::swapaxes(matrix.weight, -1, -2, s), tokens, experts, sorted, s);
  }
  return mx::gather_qmm(x, matrix.weight, *matrix.scales, matrix.biases, tokens, experts, /*transpose=*/true,
                        matrix.group_size, matrix.bits, matrix.mode, std::nullopt, sorted, s);
}

}  // namespace

std::pair<mx::array, mx::array> route_fallback(const mx::array& logits, int top_k, Scoring scoring, bool normalize,
                                               mx::StreamOrDevice device) {
  const mx::Stream s = mx::to_stream(device);
  const mx::array x = mx::astype(logits, mx::float32, s);
  const mx::array scores = scoring == Scoring::kSoftmax ? mx::softmax(x, -1, /*precise=*/true, s) : mx::sigmoid(x, s);
  // Scores are not negative, so that their bits order them. With its id below it each key is unique, and an ascending
  // sort of the inverted bits brings the best first.
  const mx::array bits = mx::astype(mx::bitwise_invert(mx::view(scores, mx::uint32, s), s), mx::uint64, s);
  const mx::array ids = mx::astype(mx::arange(logits.shape(1), mx::uint32, s), mx::uint64, s);
  const mx::array keys = mx::bitwise_or(mx::left_shift(bits, mx::array(32, mx::uint64), s), ids, s);  // [T, E]
  const mx::array best = mx::slice(mx::sort(keys, -1, s), {0, 0}, {logits.shape(0), top_k}, s);       // [T, top_k]
  const mx::array best_bits = mx::astype(mx::right_shift(best, mx::array(32, mx::uint64), s), mx::uint32, s);
  mx::array weights = mx::view(mx::bitwise_invert(best_bits, s), mx::float32, s);
  if (normalize) {
    weights = mx::divide(weights, mx::sum(weights, -1, /*keepdims=*/true, s), s);
  }
  return {mx::astype(mx::astype(best, mx::uint32, s), mx::int32, s), weights};
}

ExpertRows expert_rows(const mx::array& x, const mx::array& experts, const ExpertMatrix& gate, const ExpertMatrix& up,
                       const ExpertMatrix& down, bool sorted, mx::Stream s) {
  const int top_k = experts.shape(1), num_rows = static_cast<int>(experts.size());
  mx::array ids = mx::flatten(experts, s);                            // [T * k]
  mx::array pair_of_row = mx::arange(0, num_rows, 1, mx::uint32, s);  // [T * k]
  mx::array row_of_pair = pair_of_row;                                // [T * k]
  if (sorted) {
    pair_of_row = mx::argsort(ids, 0, s);
    row_of_pair = mx::argsort(pair_of_row, 0, s);
    ids = mx::take(ids, pair_of_row, s);
  }
  const mx::array token_of_row = mx::floor_divide(pair_of_row, mx::array(top_k, mx::uint32), s);
  const mx::array rows_x = mx::expand_dims(x, 1, s);  // [T, 1, D]
  const mx::array hidden = silu_mul(expert_linear(rows_x, token_of_row, gate, ids, sorted, s),
                                    expert_linear(rows_x, token_of_row, up, ids, sorted, s), s);  // [T * k, 1, N]
  return {mx::squeeze(expert_linear(hidden, std::nullopt, down, ids, sorted, s), 1, s), row_of_pair};
}

mx::array moe_mlp_fallback(const mx::array& x, const mx::array& experts, const mx::array& weights,
                           const ExpertMatrix& gate, const ExpertMatrix& up, const ExpertMatrix& down,
                           const std::optional<mx::array>& shared, mx::StreamOrDevice device) {
  const mx::Stream s = mx::to_stream(device);
  if (x.size() == 0 || experts.size() == 0) {  // MLX's products crash without rows on CUDA
    return shared ? mx::astype(*shared, x.dtype(), s) : mx::zeros(x.shape(), x.dtype(), s);
  }
  const bool sorted = static_cast<int>(experts.size()) >= kMinSortedRows;
  const auto [rows, row_of_pair] = expert_rows(x, experts, gate, up, down, sorted, s);
  mx::array y = mx::reshape(sorted ? mx::take(rows, row_of_pair, 0, s) : rows,
                            {x.shape(0), experts.shape(1), x.shape(1)}, s);  // [T, k, D]
  y = mx::sum(mx::multiply(mx::astype(y, mx::float32, s), mx::expand_dims(weights, -1, s), s), 1, false, s);
  if (shared) {
    y = mx::add(y, mx::astype(*shared, mx::float32, s), s);
  }
  return mx::astype(y, x.dtype(), s);  // [T, D]
}

}  // namespace mlx_server
