#include "linear/linear.h"

#include <memory>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "common/op_error.h"
#include "common/row_contiguous.h"
#include "linear/linear_cpu.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr const char* kName = "quantized_linear";

class QuantizedLinearPrimitive : public mx::UnaryPrimitive {
 public:
  QuantizedLinearPrimitive(mx::Stream stream, int group_size, int bits)
      : UnaryPrimitive(stream), group_size_(group_size), bits_(bits) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    const mx::array x = row_contiguous(inputs[0], stream()), weight = row_contiguous(inputs[1], stream());
    const mx::array scales = row_contiguous(inputs[2], stream()), biases = row_contiguous(inputs[3], stream());
    out.set_data(mx::allocator::malloc(out.nbytes()));
    const std::int64_t k = x.shape(-1);
    const QuantizedLinear op{.x = x.data<float>(),
                             .weight = weight.data<std::uint8_t>(),
                             .scales = scales.data<float>(),
                             .biases = biases.data<float>(),
                             .y = out.data<float>(),
                             .rows = static_cast<std::int64_t>(x.size()) / k,
                             .n = out.shape(-1),
                             .k = k,
                             .group_size = group_size_,
                             .bits = bits_};
    mx::cpu::get_command_encoder(stream()).dispatch([op] { quantized_linear(op, ThreadPool::shared()); });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    op_error(kName, "the primitive must run on a CPU stream but got a GPU stream");
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const QuantizedLinearPrimitive&>(other);
    return group_size_ == o.group_size_ && bits_ == o.bits_;
  }

  DEFINE_NAME(QuantizedLinear)

 private:
  int group_size_, bits_;
};

void check(const mx::array& x, const mx::array& weight, const mx::array& scales, const mx::array& biases,
           int group_size, int bits) {
  if (x.ndim() < 1 || !mx::issubdtype(x.dtype(), mx::floating)) {
    op_error(kName, "x must be floating point [..., K] but got ", x.dtype(), " ", x.shape());
  }
  if (weight.ndim() != 2 || weight.dtype() != mx::uint32) {
    op_error(kName, "weight must be uint32 [N, K * bits / 32] but got ", weight.dtype(), " ", weight.shape());
  }
  if (bits < 1 || bits > 8 || group_size < 1) {
    op_error(kName, "group_size must be positive and bits in 1..8 but got ", group_size, " and ", bits);
  }
  const std::int64_t k = std::int64_t{weight.shape(1)} * 32 / bits;
  if (x.shape(-1) != k) {
    op_error(kName, "x must have the ", k, " columns of a ", bits, "-bit weight ", weight.shape(), " but got ",
             x.shape());
  }
  const mx::Shape groups{weight.shape(0), static_cast<int>(k / group_size)};
  if (scales.shape() != groups || biases.shape() != groups || k % group_size != 0) {
    op_error(kName, "scales and biases must have the shape ", groups, " for ", k, " columns in groups of ", group_size,
             " but got ", scales.shape(), " and ", biases.shape());
  }
  if (!mx::issubdtype(scales.dtype(), mx::floating) || scales.dtype() != biases.dtype()) {
    op_error(kName, "scales and biases must have one floating point dtype but got ", scales.dtype(), " and ",
             biases.dtype());
  }
}

}  // namespace

mx::array quantized_linear(const mx::array& x, const mx::array& weight, const mx::array& scales,
                           const mx::array& biases, int group_size, int bits, mx::StreamOrDevice s) {
  check(x, weight, scales, biases, group_size, bits);
  const mx::Stream stream = mx::to_stream(s);
  const bool has_kernel = stream.device == mx::Device::cpu && bits > 1 && bits != 7 &&
                          (group_size == 32 || group_size == 64 || group_size == 128) && x.shape(-1) > 0 &&
                          scales.dtype() == mx::float32;
  if (!has_kernel) {
    const auto y = mx::quantized_matmul(x, weight, scales, biases, /*transpose=*/true, group_size, bits, "affine", s);
    return mx::astype(y, x.dtype(), s);
  }
  mx::Shape shape = x.shape();
  shape.back() = weight.shape(0);
  const mx::array y(shape, mx::float32, std::make_shared<QuantizedLinearPrimitive>(stream, group_size, bits),
                    {mx::astype(x, mx::float32, s), weight, scales, biases});
  return mx::astype(y, x.dtype(), s);
}

}  // namespace mlx_server
