#include "linear/linear.h"

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
#include "linear/linear_gpu.h"
#include "linear/weight_form.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr const char* kLinear = "linear";
constexpr const char* kQuantized = "quantized_linear";

// x float32 [..., K] and the arrays of a matrix [N, K]  ->  [..., N] float32
class LinearPrimitive : public mx::UnaryPrimitive {
 public:
  LinearPrimitive(mx::Stream stream, const WeightForm& form) : UnaryPrimitive(stream), form_(form) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    std::vector<mx::array> in;
    for (const mx::array& input : inputs) {
      in.push_back(row_contiguous(input, stream()));
    }
    out.set_data(mx::allocator::malloc(out.nbytes()));
    const std::int64_t k = in[0].shape(-1);
    std::size_t next = 1;
    const QuantizedLinear op{.x = in[0].data<float>(),
                             .w = linear_weights(form_, in, next, out.shape(-1), k),
                             .y = out.data<float>(),
                             .rows = static_cast<std::int64_t>(in[0].size()) / k};
    mx::cpu::get_command_encoder(stream()).dispatch([op] { quantized_linear(op, ThreadPool::shared()); });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    op_error(kLinear, "the primitive must run on a CPU stream but got a GPU stream");
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return form_ == static_cast<const LinearPrimitive&>(other).form_;
  }

  DEFINE_NAME(Linear)

 private:
  WeightForm form_;
};

mx::array launch(const mx::array& x, const WeightForm& form, std::vector<mx::array> matrix, mx::Stream s) {
  mx::Shape shape = x.shape();
  shape.back() = matrix[0].shape(0);
  matrix.insert(matrix.begin(), mx::astype(x, mx::float32, s));
  const mx::array y(shape, mx::float32, std::make_shared<LinearPrimitive>(s, form), std::move(matrix));
  return mx::astype(y, x.dtype(), s);
}

bool is_floating(const mx::array& a) { return mx::issubdtype(a.dtype(), mx::floating); }

void check_quantized(const mx::array& x, const mx::array& weight, const mx::array& scales,
                     const std::optional<mx::array>& biases, int group_size, int bits, const std::string& mode) {
  if (x.ndim() < 1 || !is_floating(x)) {
    op_error(kQuantized, "x must be floating point [..., K] but got ", x.dtype(), " ", x.shape());
  }
  if (weight.ndim() != 2 || weight.dtype() != mx::uint32) {
    op_error(kQuantized, "weight must be uint32 [N, K * bits / 32] but got ", weight.dtype(), " ", weight.shape());
  }
  if (bits < 1 || bits > 8 || group_size < 1) {
    op_error(kQuantized, "group_size must be positive and bits in 1..8 but got ", group_size, " and ", bits);
  }
  const std::int64_t k = std::int64_t{weight.shape(1)} * 32 / bits;
  if (x.shape(-1) != k) {
    op_error(kQuantized, "x must have the ", k, " columns of a ", bits, "-bit weight ", weight.shape(), " but got ",
             x.shape());
  }
  if ((mode == "affine") != biases.has_value()) {
    op_error(kQuantized, "there must be biases in the mode affine and no other but got the mode ", mode);
  }
  const mx::Shape groups{weight.shape(0), static_cast<int>(k / group_size)};
  if (scales.shape() != groups || (biases && biases->shape() != groups) || k % group_size != 0) {
    op_error(kQuantized, "scales and biases must have the shape ", groups, " for ", k, " columns in groups of ",
             group_size, " but got ", scales.shape(), " and ", biases ? biases->shape() : groups);
  }
  if (!biases && scales.dtype() != mx::uint8) {
    op_error(kQuantized, "scales of the mode ", mode, " must be uint8 but got ", scales.dtype());
  }
  if (biases && (!is_floating(scales) || scales.dtype() != biases->dtype())) {
    op_error(kQuantized, "scales and biases must have one floating point dtype but got ", scales.dtype(), " and ",
             biases->dtype());
  }
}

}  // namespace

mx::array linear(const mx::array& x, const mx::array& weight, mx::StreamOrDevice s) {
  if (weight.ndim() != 2 || !is_floating(weight)) {
    op_error(kLinear, "weight must be floating point [N, K] but got ", weight.dtype(), " ", weight.shape());
  }
  if (x.ndim() < 1 || !is_floating(x) || x.shape(-1) != weight.shape(1)) {
    op_error(kLinear, "x must be floating point [..., ", weight.shape(1), "] but got ", x.dtype(), " ", x.shape());
  }
  const mx::Stream stream = mx::to_stream(s);
  const auto form = weight_form(weight, std::nullopt, std::nullopt, 0, 0, "", weight.shape(1));
  if (!is_gpu(stream) && form) {
    return launch(x, *form, {weight}, stream);
  }
  const auto y = is_gpu(stream) ? linear_gpu(x, weight, stream) : mx::matmul(x, mx::transpose(weight, stream), stream);
  return mx::astype(y, x.dtype(), stream);
}

mx::array quantized_linear(const mx::array& x, const mx::array& weight, const mx::array& scales,
                           const std::optional<mx::array>& biases, int group_size, int bits, const std::string& mode,
                           mx::StreamOrDevice s) {
  check_quantized(x, weight, scales, biases, group_size, bits, mode);
  const mx::Stream stream = mx::to_stream(s);
  const auto form = weight_form(weight, scales, biases, group_size, bits, mode, x.shape(-1));
  if (!is_gpu(stream) && form) {
    std::vector<mx::array> matrix{weight, scales};
    if (biases) {
      matrix.push_back(*biases);
    }
    return launch(x, *form, std::move(matrix), stream);
  }
  const auto y = is_gpu(stream) ? quantized_linear_gpu(x, weight, scales, biases, group_size, bits, mode, stream)
                                : mx::quantized_matmul(x, weight, scales, biases, /*transpose=*/true, group_size, bits,
                                                       mode, stream);
  return mx::astype(y, x.dtype(), stream);
}

}  // namespace mlx_server
