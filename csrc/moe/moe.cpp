#include "moe/moe.h"

#include <mlx/ops.h>

#include "common/op_error.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr const char* kRoute = "route";
constexpr const char* kMlp = "moe_mlp";

bool is_floating(const mx::array& a) { return mx::issubdtype(a.dtype(), mx::floating); }

// Throws unless the matrices are [num_experts, n, k].
void check_matrix(const char* name, const ExpertMatrix& matrix, int num_experts, int n, int k) {
  const mx::array& weight = matrix.weight;
  if (!matrix.scales) {
    if (weight.shape() != mx::Shape{num_experts, n, k} || !is_floating(weight)) {
      op_error(kMlp, name, " must be floating point (", num_experts, ",", n, ",", k, ") but got ", weight.dtype(), " ",
               weight.shape());
    }
    return;
  }
  const int group_size = matrix.group_size, bits = matrix.bits;
  if (bits < 1 || bits > 8 || group_size < 1 || k % group_size != 0) {
    op_error(kMlp, name, " must have bits in 1..8 and groups that divide its ", k, " columns but got ", bits, " and ",
             group_size);
  }
  const mx::Shape packed{num_experts, n, static_cast<int>(std::int64_t{k} * bits / 32)};
  const mx::Shape groups{num_experts, n, k / group_size};
  if (weight.shape() != packed || weight.dtype() != mx::uint32) {
    op_error(kMlp, name, " must be uint32 ", packed, " but got ", weight.dtype(), " ", weight.shape());
  }
  if (matrix.scales->shape() != groups || (matrix.biases && matrix.biases->shape() != groups)) {
    op_error(kMlp, "scales and biases of ", name, " must have the shape ", groups, " but got ", matrix.scales->shape(),
             " and ", matrix.biases ? matrix.biases->shape() : groups);
  }
  if ((matrix.mode == "affine") != matrix.biases.has_value()) {
    op_error(kMlp, name, " must have biases in the mode affine and no other but got the mode ", matrix.mode);
  }
}

void check_tokens(const mx::array& x, const mx::array& experts, const mx::array& weights,
                  const std::optional<mx::array>& shared) {
  if (x.ndim() != 2 || !is_floating(x)) {
    op_error(kMlp, "x must be floating point [T, D] but got ", x.dtype(), " ", x.shape());
  }
  if (experts.ndim() != 2 || experts.shape(0) != x.shape(0) || experts.dtype() != mx::int32) {
    op_error(kMlp, "experts must be int32 [", x.shape(0), ", k] but got ", experts.dtype(), " ", experts.shape());
  }
  if (weights.shape() != experts.shape() || weights.dtype() != mx::float32) {
    op_error(kMlp, "weights must be float32 ", experts.shape(), " like experts but got ", weights.dtype(), " ",
             weights.shape());
  }
  if (shared && (shared->shape() != x.shape() || shared->dtype() != x.dtype())) {
    op_error(kMlp, "shared must be ", x.dtype(), " ", x.shape(), " like x but got ", shared->dtype(), " ",
             shared->shape());
  }
}

}  // namespace

std::pair<mx::array, mx::array> route(const mx::array& logits, int top_k, Scoring scoring, bool normalize,
                                      mx::StreamOrDevice s) {
  if (logits.ndim() != 2 || !is_floating(logits)) {
    op_error(kRoute, "logits must be floating point [T, E] but got ", logits.dtype(), " ", logits.shape());
  }
  if (top_k < 1 || top_k > logits.shape(1)) {
    op_error(kRoute, "top_k must be in 1..", logits.shape(1), " but got ", top_k);
  }
  return route_fallback(logits, top_k, scoring, normalize, s);
}

mx::array moe_mlp(const mx::array& x, const mx::array& experts, const mx::array& weights, const ExpertMatrix& gate,
                  const ExpertMatrix& up, const ExpertMatrix& down, const std::optional<mx::array>& shared,
                  mx::StreamOrDevice s) {
  check_tokens(x, experts, weights, shared);
  if (gate.weight.ndim() != 3) {
    op_error(kMlp, "gate must be [E, N, D] but got ", gate.weight.shape());
  }
  const int num_experts = gate.weight.shape(0), n = gate.weight.shape(1), d = x.shape(1);
  check_matrix("gate", gate, num_experts, n, d);
  check_matrix("up", up, num_experts, n, d);
  check_matrix("down", down, num_experts, d, n);
  return moe_mlp_fallback(x, experts, weights, gate, up, down, shared, s);
}

}  // namespace mlx_server
