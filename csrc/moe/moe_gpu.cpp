#include "moe/moe_gpu.h"

#include <algorithm>
#include <bit>
#include <sstream>

#include "common/op_error.h"
#include "elementwise/elementwise.h"
#include "kernel_sources.h"
#include "kernels/kernel_use.h"
#include "kernels/launch.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 4;    // of a simdgroup in moe_hidden, of a group in moe_output
constexpr int kFewTokens = 8;  // so many don't pay for a sort, however few the experts are
constexpr int kSortThreads = 1024;
constexpr int kMaxExperts = 1024;  // whose counters fit into shared memory, with room to spare

bool has_kernel(const ExpertMatrix& matrix, mx::Dtype dtype) {
  if (!matrix.scales) {
    return matrix.weight.dtype() == dtype;
  }
  const int group_size = matrix.group_size, bits = matrix.bits;
  return matrix.mode == "affine" && bits > 1 && bits != 7 &&
         (group_size == 32 || group_size == 64 || group_size == 128) && matrix.scales->dtype() == dtype &&
         matrix.biases->dtype() == dtype;
}

// 32 if the matrix is plain.
int bits(const ExpertMatrix& matrix) { return matrix.scales ? matrix.bits : 32; }

std::string form(const ExpertMatrix& matrix) {
  std::ostringstream text;
  if (matrix.scales) {
    text << matrix.mode << ' ' << matrix.bits << " bits in groups of " << matrix.group_size << ' '
         << matrix.scales->dtype();
  } else {
    text << matrix.weight.dtype();
  }
  text << ' ' << matrix.weight.shape();
  return text.str();
}

// Whether kernels can read the experts' matrices.
bool are_readable(const mx::array& x, const ExpertMatrix& gate, const ExpertMatrix& up, const ExpertMatrix& down) {
  return x.shape(1) % 32 == 0 && gate.weight.shape(1) % 32 == 0 && has_kernel(gate, x.dtype()) &&
         has_kernel(up, x.dtype()) && has_kernel(down, x.dtype());
}

// Whether those that are readable can be computed token by token.
bool has_few_kernels(const ExpertMatrix& gate, const ExpertMatrix& up) {
  return are_enabled({"moe_hidden", "moe_output"}) && bits(gate) == bits(up) && gate.group_size == up.group_size;
}

// Whether those that are readable can be computed expert by expert.
bool has_matrix_kernels(const mx::array& x, const ExpertMatrix& gate) {
  return are_enabled({"moe_sort", "moe_matrix", "moe_join"}) && x.dtype().size() == 2 &&
         gate.weight.shape(0) <= kMaxExperts && has_matrix_units();
}

// With more tokens, most experts would be read several times.
bool are_few(const mx::array& experts, const ExpertMatrix& gate) {
  return experts.shape(0) <= kFewTokens || static_cast<int>(experts.size()) <= gate.weight.shape(0);
}

// The weight, its scales and biases; a plain matrix stands for all three.
void append(std::vector<mx::array>& inputs, const ExpertMatrix& matrix) {
  inputs.insert(inputs.end(),
                {matrix.weight, matrix.scales.value_or(matrix.weight), matrix.biases.value_or(matrix.weight)});
}

mx::array few_tokens(const mx::array& x, const mx::array& experts, const mx::array& weights, const ExpertMatrix& gate,
                     const ExpertMatrix& up, const ExpertMatrix& down, const std::optional<mx::array>& shared,
                     mx::Stream s) {
  const int tokens = x.shape(0), d = x.shape(1), top_k = experts.shape(1), n = gate.weight.shape(1);
  constexpr int kGroupColumns = kColumns * kThreads / 32;
  KernelLaunch hidden{.inputs = {x, experts},
                      .output_shapes = {{tokens, top_k, n}},
                      .output_dtypes = {x.dtype()},
                      .constants = {{"T", x.dtype()}, {"BITS", bits(gate)}},
                      .groups = {(n + kGroupColumns - 1) / kGroupColumns, top_k, tokens},
                      .threads = kThreads};
  append(hidden.inputs, gate);
  append(hidden.inputs, up);
  KernelLaunch output{.inputs = {launch(kernel_sources::moe_hidden, hidden, s)[0], experts, weights},
                      .output_shapes = {x.shape()},
                      .output_dtypes = {x.dtype()},
                      .constants = {{"T", x.dtype()}, {"BITS", bits(down)}, {"HAS_SHARED", shared ? 1 : 0}},
                      .groups = {d / kColumns, tokens, 1},
                      .threads = kThreads};
  append(output.inputs, down);
  output.inputs.push_back(shared.value_or(x));
  return launch(kernel_sources::moe_output, output, s)[0];
}

// As expert_rows, sorted, by kernels.
ExpertRows matrix_rows(const mx::array& x, const mx::array& experts, const ExpertMatrix& gate, const ExpertMatrix& up,
                       const ExpertMatrix& down, mx::Stream s) {
  const int pairs = static_cast<int>(experts.size()), num_experts = gate.weight.shape(0);
  const int mean_rows = pairs / num_experts;
  const int tile_rows = mean_rows <= 16 ? 16 : mean_rows <= 32 ? 32 : 64;
  const int tiles = pairs / tile_rows + std::min(num_experts, pairs);
  const auto sorted = launch(kernel_sources::moe_sort,
                             {.inputs = {experts},
                              .output_shapes = {{pairs}, {pairs}, {tiles, 3}},
                              .output_dtypes = {mx::int32, mx::uint32, mx::int32},
                              .constants = {{"EXPERTS", num_experts}, {"ROWS", tile_rows}},
                              .groups = {1, 1, 1},
                              .threads = kSortThreads},
                             s);
  const auto multiply = [&](const mx::array& rows, const ExpertMatrix& matrix, bool gather) {
    const int n = matrix.weight.shape(1);
    KernelLaunch product{.inputs = {rows},
                         .output_shapes = {{pairs, n}},
                         .output_dtypes = {x.dtype()},
                         .constants = {{"T", x.dtype()},
                                       {"BITS", matrix.scales ? matrix.bits : 16},
                                       {"GROUP_SIZE", matrix.scales ? matrix.group_size : 32},
                                       {"ROWS", tile_rows},
                                       {"GATHER", gather ? 1 : 0}},
                         .groups = {(n + kThreads / 2 - 1) / (kThreads / 2), tiles, 1},
                         .threads = kThreads};
    append(product.inputs, matrix);
    product.inputs.insert(product.inputs.end(), {sorted[0], sorted[2]});
    return launch(kernel_sources::moe_matrix, product, s)[0];
  };
  const mx::array hidden = silu_mul(multiply(x, gate, true), multiply(x, up, true), s);
  return {multiply(hidden, down, false), sorted[1]};
}

mx::array join(const ExpertRows& y, const mx::array& x, const mx::array& weights,
               const std::optional<mx::array>& shared, mx::Stream s) {
  return launch(kernel_sources::moe_join,
                {.inputs = {y.rows, y.row_of_pair, weights, shared.value_or(x)},
                 .output_shapes = {x.shape()},
                 .output_dtypes = {x.dtype()},
                 .constants = {{"T", x.dtype()}, {"HAS_SHARED", shared ? 1 : 0}},
                 .groups = {(x.shape(1) + kThreads - 1) / kThreads, x.shape(0), 1},
                 .threads = kThreads},
                s)[0];
}

}  // namespace

std::pair<mx::array, mx::array> route_gpu(const mx::array& logits, int top_k, Scoring scoring, bool normalize,
                                          mx::Stream s) {
  const bool has_kernel = top_k <= 32 && logits.shape(1) <= 1024 && logits.size() > 0 && are_enabled({"moe_route"});
  if (!has_kernel && is_batch_invariant() && logits.size() > 0) {
    op_error("route", "no kernel chooses ", top_k, " of ", logits.shape(1), " experts token by token");
  }
  if (!has_kernel) {
    return route_fallback(logits, top_k, scoring, normalize, s);
  }
  const mx::Shape shape{logits.shape(0), top_k};
  const int per_lane = static_cast<int>(std::bit_ceil(static_cast<unsigned>(logits.shape(1) + 31) / 32));
  const auto outputs = launch(kernel_sources::moe_route,
                              {.inputs = {logits},
                               .output_shapes = {shape, shape},
                               .output_dtypes = {mx::int32, mx::float32},
                               .constants = {{"T", logits.dtype()},
                                             {"PER_LANE", per_lane},
                                             {"TOP_K", top_k},
                                             {"SOFTMAX", scoring == Scoring::kSoftmax ? 1 : 0},
                                             {"NORMALIZE", normalize ? 1 : 0}},
                               .groups = {logits.shape(0), 1, 1},
                               .threads = 32},
                              s);
  return {outputs[0], outputs[1]};
}

mx::array moe_mlp_gpu(const mx::array& x, const mx::array& experts, const mx::array& weights, const ExpertMatrix& gate,
                      const ExpertMatrix& up, const ExpertMatrix& down, const std::optional<mx::array>& shared,
                      mx::Stream s) {
  if (x.size() == 0 || experts.size() == 0) {
    return moe_mlp_fallback(x, experts, weights, gate, up, down, shared, s);
  }
  const bool is_readable = are_readable(x, gate, up, down);
  const bool has_matrix = is_readable && has_matrix_kernels(x, gate);
  const bool has_few = is_readable && has_few_kernels(gate, up);
  // The batch-invariant mode computes all numbers of tokens in one way.
  if (has_matrix && is_batch_invariant()) {
    return join(matrix_rows(x, experts, gate, up, down, s), x, weights, shared, s);
  }
  if (has_few && (are_few(experts, gate) || is_batch_invariant())) {
    return few_tokens(x, experts, weights, gate, up, down, shared, s);
  }
  if (is_batch_invariant()) {
    op_error("moe_mlp", "no kernel computes experts token by token whose gate is ", form(gate), ", up ", form(up),
             " and down ", form(down), ", for x ", x.dtype());
  }
  if (has_matrix && is_cuda()) {
    return join(matrix_rows(x, experts, gate, up, down, s), x, weights, shared, s);
  }
  if (has_few && is_cuda() && !gate.scales) {  // MLX's product of plain ones is wrong there
    return few_tokens(x, experts, weights, gate, up, down, shared, s);
  }
  if (are_enabled({"moe_join"})) {
    return join(expert_rows(x, experts, gate, up, down, /*sorted=*/true, s), x, weights, shared, s);
  }
  return moe_mlp_fallback(x, experts, weights, gate, up, down, shared, s);
}

}  // namespace mlx_server
