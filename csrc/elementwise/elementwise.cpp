#include "elementwise/elementwise.h"

#include <memory>
#include <string_view>
#include <utility>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/fast.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "common/op_error.h"
#include "common/row_contiguous.h"
#include "elementwise/elementwise_cpu.h"
#include "kernel_sources.h"
#include "kernels/kernel_use.h"
#include "kernels/launch.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

// What the primitives share: they exist on CPU streams only.
class CpuPrimitive : public mx::UnaryPrimitive {
 public:
  using UnaryPrimitive::UnaryPrimitive;

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    op_error(name(), "the primitive must run on a CPU stream but got a GPU stream");
  }

 protected:
  template <typename Task>
  void dispatch(Task task) {
    mx::cpu::get_command_encoder(stream()).dispatch(std::move(task));
  }
};

class RmsNormPrimitive : public CpuPrimitive {
 public:
  RmsNormPrimitive(mx::Stream stream, float eps) : CpuPrimitive(stream), eps_(eps) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    const mx::array x = row_contiguous(inputs[0], stream()), weight = row_contiguous(inputs[1], stream());
    out.set_data(mx::allocator::malloc(out.nbytes()));
    const auto d = static_cast<std::int64_t>(weight.size());
    const RmsNorm op{.x = x.data<float>(),
                     .weight = weight.data<float>(),
                     .y = out.data<float>(),
                     .rows = static_cast<std::int64_t>(x.size()) / d,
                     .d = d,
                     .eps = eps_};
    dispatch([op] { rms_norm(op, ThreadPool::shared()); });
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return eps_ == static_cast<const RmsNormPrimitive&>(other).eps_;
  }
  DEFINE_NAME(RmsNorm)

 private:
  float eps_;
};

class GatedMulPrimitive : public CpuPrimitive {
 public:
  GatedMulPrimitive(mx::Stream stream, bool is_gelu) : CpuPrimitive(stream), is_gelu_(is_gelu) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    const mx::array gate = row_contiguous(inputs[0], stream()), up = row_contiguous(inputs[1], stream());
    out.set_data(mx::allocator::malloc(out.nbytes()));
    const GatedMul op{.gate = gate.data<float>(),
                      .up = up.data<float>(),
                      .y = out.data<float>(),
                      .size = static_cast<std::int64_t>(out.size())};
    dispatch([op, is_gelu = is_gelu_] {
      is_gelu ? gelu_mul(op, ThreadPool::shared()) : silu_mul(op, ThreadPool::shared());
    });
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return is_gelu_ == static_cast<const GatedMulPrimitive&>(other).is_gelu_;
  }
  DEFINE_NAME(GatedMul)

 private:
  bool is_gelu_;
};

class RopePrimitive : public CpuPrimitive {
 public:
  RopePrimitive(mx::Stream stream, bool traditional) : CpuPrimitive(stream), traditional_(traditional) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    // Heads side by side are enough: queries and keys may be slices of one product.
    const bool has_gaps = inputs[0].strides(2) != 1 || inputs[0].strides(1) != inputs[0].shape(2);
    const mx::array x = has_gaps ? row_contiguous(inputs[0], stream()) : inputs[0];
    const mx::array positions = row_contiguous(inputs[1], stream()), freqs = row_contiguous(inputs[2], stream());
    out.set_data(mx::allocator::malloc(out.nbytes()));
    const Rope op{.x = x.data<float>(),
                  .positions = positions.data<std::int32_t>(),
                  .freqs = freqs.data<float>(),
                  .y = out.data<float>(),
                  .tokens = x.shape(0),
                  .heads = x.shape(1),
                  .d = x.shape(2),
                  .half = static_cast<std::int64_t>(freqs.size()),
                  .token_stride = x.strides(0),
                  .traditional = traditional_};
    dispatch([op] { rope(op, ThreadPool::shared()); });
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    return traditional_ == static_cast<const RopePrimitive&>(other).traditional_;
  }
  DEFINE_NAME(Rope)

 private:
  bool traditional_;
};

bool is_floating(const mx::array& a) { return mx::issubdtype(a.dtype(), mx::floating); }

bool has_kernel(const mx::array& x, const mx::Stream& stream) {
  return stream.device == mx::Device::cpu && x.dtype() == mx::float32 && x.size() > 0;
}

void check_gated(const char* op, const mx::array& gate, const mx::array& up) {
  if (gate.shape() != up.shape() || gate.dtype() != up.dtype() || !is_floating(gate)) {
    op_error(op, "gate and up must have one shape and floating point dtype but got ", gate.dtype(), " ", gate.shape(),
             " and ", up.dtype(), " ", up.shape());
  }
}

constexpr int kThreads = 128;

int groups(std::size_t threads) { return static_cast<int>((threads + kThreads - 1) / kThreads); }

bool has_gpu_kernel(const mx::array& x, const mx::Stream& stream, std::string_view name) {
  return stream.device == mx::Device::gpu && x.size() > 0 && x.size() < (std::size_t{1} << 31) && are_enabled({name});
}

mx::array gated_mul_gpu(const mx::array& gate, const mx::array& up, bool is_gelu, mx::Stream s) {
  const int size = static_cast<int>(gate.size());
  const auto y = launch(kernel_sources::gated_mul,
                        {.inputs = {mx::reshape(gate, {size}, s), mx::reshape(up, {size}, s)},
                         .output_shapes = {{size}},
                         .output_dtypes = {gate.dtype()},
                         .constants = {{"T", gate.dtype()}, {"IS_GELU", is_gelu ? 1 : 0}},
                         .groups = {groups(gate.size()), 1, 1},
                         .threads = kThreads},
                        s);
  return mx::reshape(y[0], gate.shape(), s);
}

mx::array rope_gpu(const mx::array& x, const mx::array& positions, const mx::array& freqs, bool traditional,
                   mx::Stream s) {
  const std::size_t turns = static_cast<std::size_t>(x.shape(2) - freqs.shape(0));
  return launch(kernel_sources::rope,
                {.inputs = {x, positions, freqs},
                 .output_shapes = {x.shape()},
                 .output_dtypes = {x.dtype()},
                 .constants = {{"T", x.dtype()}, {"TRADITIONAL", traditional ? 1 : 0}},
                 .groups = {groups(static_cast<std::size_t>(x.shape(0)) * x.shape(1) * turns), 1, 1},
                 .threads = kThreads},
                s)[0];
}

}  // namespace

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps, mx::StreamOrDevice s) {
  if (x.ndim() < 1 || !is_floating(x)) {
    op_error("rms_norm", "x must be floating point [..., D] but got ", x.dtype(), " ", x.shape());
  }
  if (weight.shape() != mx::Shape{x.shape(-1)} || !is_floating(weight)) {
    op_error("rms_norm", "weight must be floating point [", x.shape(-1), "] but got ", weight.dtype(), " ",
             weight.shape());
  }
  const mx::Stream stream = mx::to_stream(s);
  if (x.size() == 0) {  // MLX's CUDA kernel can't be launched for it
    return x;
  }
  if (!has_kernel(x, stream) || weight.dtype() != mx::float32) {
    return mx::astype(mx::fast::rms_norm(x, weight, eps, stream), x.dtype(), stream);
  }
  return mx::array(x.shape(), mx::float32, std::make_shared<RmsNormPrimitive>(stream, eps), {x, weight});
}

mx::array silu_mul(const mx::array& gate, const mx::array& up, mx::StreamOrDevice s) {
  check_gated("silu_mul", gate, up);
  const mx::Stream stream = mx::to_stream(s);
  if (has_gpu_kernel(gate, stream, "gated_mul")) {
    return gated_mul_gpu(gate, up, false, stream);
  }
  if (!has_kernel(gate, stream)) {
    return silu_mul_fallback(gate, up, stream);
  }
  return mx::array(gate.shape(), mx::float32, std::make_shared<GatedMulPrimitive>(stream, false), {gate, up});
}

mx::array gelu_mul(const mx::array& gate, const mx::array& up, mx::StreamOrDevice s) {
  check_gated("gelu_mul", gate, up);
  const mx::Stream stream = mx::to_stream(s);
  if (has_gpu_kernel(gate, stream, "gated_mul")) {
    return gated_mul_gpu(gate, up, true, stream);
  }
  if (!has_kernel(gate, stream)) {
    return gelu_mul_fallback(gate, up, stream);
  }
  return mx::array(gate.shape(), mx::float32, std::make_shared<GatedMulPrimitive>(stream, true), {gate, up});
}

mx::array rope(const mx::array& x, const mx::array& positions, const mx::array& freqs, bool traditional,
               mx::StreamOrDevice s) {
  if (x.ndim() != 3 || !is_floating(x)) {
    op_error("rope", "x must be floating point [T, H, D] but got ", x.dtype(), " ", x.shape());
  }
  if (positions.shape() != mx::Shape{x.shape(0)} || positions.dtype() != mx::int32) {
    op_error("rope", "positions must be int32 [", x.shape(0), "] but got ", positions.dtype(), " ", positions.shape());
  }
  if (freqs.ndim() != 1 || 2 * freqs.shape(0) > x.shape(2) || freqs.dtype() != mx::float32) {
    op_error("rope", "freqs must be float32 [R / 2] with R <= ", x.shape(2), " but got ", freqs.dtype(), " ",
             freqs.shape());
  }
  const mx::Stream stream = mx::to_stream(s);
  if (has_gpu_kernel(x, stream, "rope")) {
    return rope_gpu(x, positions, freqs, traditional, stream);
  }
  if (!has_kernel(x, stream)) {
    return rope_fallback(x, positions, freqs, traditional, stream);
  }
  return mx::array(x.shape(), mx::float32, std::make_shared<RopePrimitive>(stream, traditional), {x, positions, freqs});
}

mx::array silu_mul_fallback(const mx::array& gate, const mx::array& up, mx::StreamOrDevice s) {
  return mx::multiply(mx::multiply(gate, mx::sigmoid(gate, s), s), up, s);
}

mx::array gelu_mul_fallback(const mx::array& gate, const mx::array& up, mx::StreamOrDevice s) {
  const mx::array x = mx::astype(gate, mx::float32, s);
  const mx::array cubed = mx::multiply(mx::multiply(x, x, s), x, s);
  const mx::array inner = mx::add(x, mx::multiply(cubed, mx::array(0.044715f), s), s);
  const mx::array share = mx::sigmoid(mx::multiply(inner, mx::array(1.5957691216f), s), s);  // 2 * sqrt(2 / pi)
  return mx::multiply(mx::astype(mx::multiply(x, share, s), gate.dtype(), s), up, s);
}

mx::array rope_fallback(const mx::array& x, const mx::array& positions, const mx::array& freqs, bool traditional,
                        mx::StreamOrDevice s) {
  const int tokens = x.shape(0), heads = x.shape(1), d = x.shape(2), half = freqs.shape(0);
  const mx::array turns = mx::reshape(mx::astype(positions, mx::float32, s), {tokens, 1, 1}, s);
  const mx::array angles = mx::divide(turns, freqs, s);  // [T, 1, R / 2]
  const mx::array cosines = mx::cos(angles, s), sines = mx::sin(angles, s);
  const mx::array rotated = mx::astype(mx::slice(x, {0, 0, 0}, {tokens, heads, 2 * half}, s), mx::float32, s);
  const int pair_axis = traditional ? 3 : 2;
  const mx::Shape pairs = traditional ? mx::Shape{tokens, heads, half, 2} : mx::Shape{tokens, heads, 2, half};
  const auto both = mx::split(mx::reshape(rotated, pairs, s), 2, pair_axis, s);
  const mx::array a = mx::squeeze(both[0], pair_axis, s), b = mx::squeeze(both[1], pair_axis, s);  // [T, H, R / 2]
  const mx::array turned = mx::stack({mx::subtract(mx::multiply(a, cosines, s), mx::multiply(b, sines, s), s),
                                      mx::add(mx::multiply(a, sines, s), mx::multiply(b, cosines, s), s)},
                                     pair_axis, s);
  const mx::array y = mx::astype(mx::reshape(turned, rotated.shape(), s), x.dtype(), s);
  return mx::concatenate({y, mx::slice(x, {0, 0, 2 * half}, {tokens, heads, d}, s)}, 2, s);
}

}  // namespace mlx_server
