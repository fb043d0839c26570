#include "moe/moe_gpu.h"

#include <bit>
#include <sstream>

#include <mlx/backend/cuda/cuda.h>

#include "common/op_error.h"
#include "kernel_sources.h"
#include "kernels/kernel_use.h"
#include "kernels/launch.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 4;    // of a simdgroup in moe_hidden, of a group in moe_output
constexpr int kFewTokens = 8;  // so many don't pay for a sort, however few the experts are

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

// Whether kernels can compute it token by token.
bool has_kernels(const mx::array& x, const ExpertMatrix& gate, const ExpertMatrix& up, const ExpertMatrix& down) {
  return are_enabled({"moe_hidden", "moe_output"}) && x.shape(1) % 32 == 0 && gate.weight.shape(1) % 32 == 0 &&
         has_kernel(gate, x.dtype()) && has_kernel(up, x.dtype()) && has_kernel(down, x.dtype()) &&
         bits(gate) == bits(up) && gate.group_size == up.group_size;
}

// With more tokens, most experts would be read several times. But for plain ones MLX has no right product on CUDA.
bool are_few(const mx::array& experts, const ExpertMatrix& gate) {
  return experts.shape(0) <= kFewTokens || static_cast<int>(experts.size()) <= gate.weight.shape(0) ||
         (!gate.scales && mx::cu::is_available());
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

mx::array many_tokens(const mx::array& x, const mx::array& experts, const mx::array& weights, const ExpertMatrix& gate,
                      const ExpertMatrix& up, const ExpertMatrix& down, const std::optional<mx::array>& shared,
                      mx::Stream s) {
  const ExpertRows y = expert_rows(x, experts, gate, up, down, /*sorted=*/true, s);
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
  const bool is_covered = has_kernels(x, gate, up, down);
  if (is_covered && (are_few(experts, gate) || is_batch_invariant())) {
    return few_tokens(x, experts, weights, gate, up, down, shared, s);
  }
  if (is_batch_invariant()) {
    op_error("moe_mlp", "no kernel computes experts token by token whose gate is ", form(gate), ", up ", form(up),
             " and down ", form(down), ", for x ", x.dtype());
  }
  if (are_enabled({"moe_join"})) {
    return many_tokens(x, experts, weights, gate, up, down, shared, s);
  }
  return moe_mlp_fallback(x, experts, weights, gate, up, down, shared, s);
}

}  // namespace mlx_server
