#include "moe/moe.h"

#include <array>
#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "common/op_error.h"
#include "common/row_contiguous.h"
#include "kernels/launch.h"
#include "linear/weight_form.h"
#include "moe/moe_cpu.h"
#include "moe/moe_gpu.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr const char* kRoute = "route";
constexpr const char* kMlp = "moe_mlp";

bool is_floating(const mx::array& a) { return mx::issubdtype(a.dtype(), mx::floating); }

std::vector<mx::array> without_gaps(const std::vector<mx::array>& inputs, mx::Stream s) {
  std::vector<mx::array> arrays;
  for (const mx::array& input : inputs) {
    arrays.push_back(row_contiguous(input, s));
  }
  return arrays;
}

// logits [T, E] float32  ->  experts int32, weights float32 [T, top_k]
class RoutePrimitive : public mx::Primitive {
 public:
  RoutePrimitive(mx::Stream stream, Scoring scoring, bool normalize)
      : Primitive(stream), scoring_(scoring), normalize_(normalize) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const mx::array logits = row_contiguous(inputs[0], stream());
    for (mx::array& output : outputs) {
      output.set_data(mx::allocator::malloc(output.nbytes()));
    }
    const Route op{.logits = logits.data<float>(),
                   .experts = outputs[0].data<std::int32_t>(),
                   .weights = outputs[1].data<float>(),
                   .tokens = logits.shape(0),
                   .num_experts = logits.shape(1),
                   .top_k = outputs[0].shape(1),
                   .softmax = scoring_ == Scoring::kSoftmax,
                   .normalize = normalize_};
    mx::cpu::get_command_encoder(stream()).dispatch([op] { route(op, ThreadPool::shared()); });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    op_error(kRoute, "the primitive must run on a CPU stream but got a GPU stream");
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const RoutePrimitive&>(other);
    return scoring_ == o.scoring_ && normalize_ == o.normalize_;
  }

  DEFINE_NAME(Route)

 private:
  Scoring scoring_;
  bool normalize_;
};

std::optional<WeightForm> form_of(const ExpertMatrix& matrix, int k) {
  return weight_form(matrix.weight, matrix.scales, matrix.biases, matrix.group_size, matrix.bits, matrix.mode, k);
}

// x float32, experts, weights, the arrays of gate, up and down, and perhaps shared float32  ->  [T, D] float32
class MoeMlpPrimitive : public mx::UnaryPrimitive {
 public:
  MoeMlpPrimitive(mx::Stream stream, const std::array<WeightForm, 3>& forms) : UnaryPrimitive(stream), forms_(forms) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    const std::vector<mx::array> in = without_gaps(inputs, stream());
    out.set_data(mx::allocator::malloc(out.nbytes()));
    std::size_t next = 3;
    const std::int64_t d = out.shape(1), n = in[3].shape(1), num_experts = in[3].shape(0);
    const LinearWeights gate = linear_weights(forms_[0], in, next, num_experts * n, d);
    const LinearWeights up = linear_weights(forms_[1], in, next, num_experts * n, d);
    const LinearWeights down = linear_weights(forms_[2], in, next, num_experts * d, n);
    mx::array hidden({static_cast<int>(in[1].size()), static_cast<int>(n)}, mx::float32, nullptr, {});
    hidden.set_data(mx::allocator::malloc(hidden.nbytes()));
    const MoeMlp op{.x = in[0].data<float>(),
                    .experts = in[1].data<std::int32_t>(),
                    .weights = in[2].data<float>(),
                    .gate = gate,
                    .up = up,
                    .down = down,
                    .shared = next < in.size() ? in[next].data<float>() : nullptr,
                    .hidden = hidden.data<float>(),
                    .y = out.data<float>(),
                    .tokens = in[1].shape(0),
                    .top_k = in[1].shape(1),
                    .num_experts = num_experts};
    auto& encoder = mx::cpu::get_command_encoder(stream());
    encoder.add_temporary(hidden);
    encoder.dispatch([op] { moe_mlp(op, ThreadPool::shared()); });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    op_error(kMlp, "the primitive must run on a CPU stream but got a GPU stream");
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return forms_ == static_cast<const MoeMlpPrimitive&>(other).forms_;
  }

  DEFINE_NAME(MoeMlp)

 private:
  std::array<WeightForm, 3> forms_;  // of gate, up and down
};

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
  if (matrix.mode != "affine" && matrix.scales->dtype() != mx::uint8) {
    op_error(kMlp, "scales of ", name, " must be uint8 in the mode ", matrix.mode, " but got ", matrix.scales->dtype());
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
  const mx::Stream stream = mx::to_stream(s);
  if (is_gpu(stream)) {
    return route_gpu(logits, top_k, scoring, normalize, stream);
  }
  const mx::Shape shape{logits.shape(0), top_k};
  const auto outputs = mx::array::make_arrays({shape, shape}, {mx::int32, mx::float32},
                                              std::make_shared<RoutePrimitive>(stream, scoring, normalize),
                                              {mx::astype(logits, mx::float32, stream)});
  return {outputs[0], outputs[1]};
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
  const mx::Stream stream = mx::to_stream(s);
  if (is_gpu(stream)) {
    return moe_mlp_gpu(x, experts, weights, gate, up, down, shared, stream);
  }
  const auto gate_form = form_of(gate, d), up_form = form_of(up, d), down_form = form_of(down, n);
  if (!gate_form || !up_form || !down_form) {
    return moe_mlp_fallback(x, experts, weights, gate, up, down, shared, stream);
  }
  std::vector<mx::array> inputs{mx::astype(x, mx::float32, stream), experts, weights};
  for (const ExpertMatrix* matrix : {&gate, &up, &down}) {
    inputs.push_back(matrix->weight);
    if (matrix->scales) {
      inputs.push_back(*matrix->scales);
    }
    if (matrix->biases) {
      inputs.push_back(*matrix->biases);
    }
  }
  if (shared) {
    inputs.push_back(mx::astype(*shared, mx::float32, stream));
  }
  const std::array<WeightForm, 3> forms{*gate_form, *up_form, *down_form};
  const mx::array y(x.shape(), mx::float32, std::make_shared<MoeMlpPrimitive>(stream, forms), std::move(inputs));
  return mx::astype(y, x.dtype(), stream);
}

}  // namespace mlx_server
