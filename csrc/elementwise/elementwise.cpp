#include "elementwise/elementwise.h"

#include <bit>
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

  // inputs: gate and up, or both in one
  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    const mx::array gate = row_contiguous(inputs.front(), stream()), up = row_contiguous(inputs.back(), stream());
    out.set_data(mx::allocator::malloc(out.nbytes()));
    const bool is_joined = inputs.size() == 1;
    const auto size = static_cast<std::int64_t>(is_joined ? out.shape(-1) : out.size());
    const GatedMul op{.gate = gate.data<float>(),
                      .up = up.data<float>() + (is_joined ? size : 0),
                      .y = out.data<float>(),
                      .rows = static_cast<std::int64_t>(out.size()) / size,
                      .size = size,
                      .stride = is_joined ? 2 * size : size};
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

// inputs: qkv, positions, freqs and, if there are any, norms; outputs: q, k, v
class QkvRopePrimitive : public mx::Primitive {
 public:
  QkvRopePrimitive(mx::Stream stream, float eps, float length_factor, bool gated)
      : Primitive(stream), eps_(eps), length_factor_(length_factor), gated_(gated) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    const mx::array x = row_contiguous(inputs[0], stream()), positions = row_contiguous(inputs[1], stream());
    const mx::array freqs = row_contiguous(inputs[2], stream()), norms = row_contiguous(inputs.back(), stream());
    for (mx::array& output : outputs) {
      output.set_data(mx::allocator::malloc(output.nbytes()));
    }
    const QkvRope op{.x = x.data<float>(),
                     .positions = positions.data<std::int32_t>(),
                     .freqs = freqs.data<float>(),
                     .norms = inputs.size() == 4 ? norms.data<float>() : nullptr,
                     .q = outputs[0].data<float>(),
                     .k = outputs[1].data<float>(),
                     .v = outputs[2].data<float>(),
                     .tokens = x.shape(0),
                     .token_stride = x.shape(1),
                     .heads = outputs[0].shape(1),
                     .kv_heads = outputs[1].shape(1),
                     .d = outputs[0].shape(2),
                     .half = freqs.shape(0),
                     .eps = eps_,
                     .length_factor = length_factor_,
                     .gated = gated_};
    mx::cpu::get_command_encoder(stream()).dispatch([op] { qkv_rope(op, ThreadPool::shared()); });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    op_error(name(), "the primitive must run on a CPU stream but got a GPU stream");
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const QkvRopePrimitive&>(other);
    return eps_ == o.eps_ && length_factor_ == o.length_factor_ && gated_ == o.gated_;
  }
  DEFINE_NAME(QkvRope)

 private:
  float eps_, length_factor_;
  bool gated_;
};

bool is_floating(const mx::array& a) { return mx::issubdtype(a.dtype(), mx::floating); }

bool has_kernel(const mx::array& x, const mx::Stream& stream) {
  return stream.device == mx::Device::cpu && x.dtype() == mx::float32 && x.size() > 0;
}

// The shape of a gated product.
mx::Shape check_gated(const char* op, const mx::array& x, const std::optional<mx::array>& up) {
  if (up && (x.shape() != up->shape() || x.dtype() != up->dtype() || !is_floating(x))) {
    op_error(op, "gate and up must have one shape and floating point dtype but got ", x.dtype(), " ", x.shape(),
             " and ", up->dtype(), " ", up->shape());
  }
  if (!up && (x.ndim() < 1 || x.shape(-1) % 2 != 0 || !is_floating(x))) {
    op_error(op, "gate and up in one must be floating point [..., 2 N] but got ", x.dtype(), " ", x.shape());
  }
  mx::Shape shape = x.shape();
  if (!up) {
    shape.back() /= 2;
  }
  return shape;
}

constexpr int kThreads = 128;

int groups(std::size_t threads) { return static_cast<int>((threads + kThreads - 1) / kThreads); }

bool has_gpu_kernel(const mx::array& x, const mx::Stream& stream, std::string_view name) {
  return is_gpu(stream) && x.size() > 0 && x.size() < (std::size_t{1} << 31) && are_enabled({name});
}

mx::array gated_mul_gpu(const mx::array& x, const std::optional<mx::array>& up, const mx::Shape& shape, bool is_gelu,
                        mx::Stream s) {
  const int columns = x.shape(-1), rows = static_cast<int>(x.size()) / columns;
  const mx::array gate = mx::reshape(x, {rows, columns}, s);
  const std::size_t size = up ? x.size() : x.size() / 2;
  const auto y = launch(kernel_sources::gated_mul,
                        {.inputs = {gate, up ? mx::reshape(*up, {rows, columns}, s) : gate},
                         .output_shapes = {shape},
                         .output_dtypes = {x.dtype()},
                         .constants = {{"T", x.dtype()}, {"IS_GELU", is_gelu ? 1 : 0}, {"JOINED", up ? 0 : 1}},
                         .groups = {groups(size), 1, 1},
                         .threads = kThreads},
                        s);
  return y[0];
}

mx::array gated_mul(const mx::array& x, const std::optional<mx::array>& up, bool is_gelu, mx::Stream s) {
  const mx::Shape shape = check_gated(is_gelu ? "gelu_mul" : "silu_mul", x, up);
  if (has_gpu_kernel(x, s, "gated_mul")) {
    return gated_mul_gpu(x, up, shape, is_gelu, s);
  }
  if (!has_kernel(x, s)) {
    return is_gelu ? gelu_mul_fallback(x, up, s) : silu_mul_fallback(x, up, s);
  }
  std::vector<mx::array> inputs{x};
  if (up) {
    inputs.push_back(*up);
  }
  return mx::array(shape, mx::float32, std::make_shared<GatedMulPrimitive>(s, is_gelu), std::move(inputs));
}

// gate and up
std::pair<mx::array, mx::array> halves(const mx::array& x, const std::optional<mx::array>& up, mx::Stream s) {
  if (up) {
    return {x, *up};
  }
  const auto both = mx::split(x, 2, -1, s);
  return {both[0], both[1]};
}

// [T, H, D] of queries, and of keys or values
std::vector<mx::Shape> check_qkv_rope(const mx::array& qkv, const mx::array& positions, const mx::array& freqs,
                                      const QkvRopeOptions& options) {
  constexpr const char* kName = "qkv_rope";
  if (options.num_heads < 1 || options.num_kv_heads < 1) {
    op_error(kName, "there must be heads but got ", options.num_heads, " and ", options.num_kv_heads);
  }
  const int heads = options.num_heads * (options.gated ? 2 : 1) + 2 * options.num_kv_heads;
  if (qkv.ndim() != 2 || qkv.shape(1) == 0 || qkv.shape(1) % heads != 0 || !is_floating(qkv)) {
    op_error(kName, "qkv must be floating point [T, ", heads, " * D] but got ", qkv.dtype(), " ", qkv.shape());
  }
  const int tokens = qkv.shape(0), d = qkv.shape(1) / heads;
  if (positions.shape() != mx::Shape{tokens} || positions.dtype() != mx::int32) {
    op_error(kName, "positions must be int32 [", tokens, "] but got ", positions.dtype(), " ", positions.shape());
  }
  if (freqs.ndim() != 1 || 2 * freqs.shape(0) > d || freqs.dtype() != mx::float32) {
    op_error(kName, "freqs must be float32 [R / 2] with R <= ", d, " but got ", freqs.dtype(), " ", freqs.shape());
  }
  if (options.norms && (options.norms->shape() != mx::Shape{2, d} || options.norms->dtype() != mx::float32)) {
    op_error(kName, "norms must be float32 [2, ", d, "] but got ", options.norms->dtype(), " ", options.norms->shape());
  }
  const mx::Shape q{tokens, options.num_heads, d}, kv{tokens, options.num_kv_heads, d};
  return {q, kv, kv};
}

std::vector<mx::array> qkv_rope_gpu(const mx::array& qkv, const mx::array& positions, const mx::array& freqs,
                                    const QkvRopeOptions& options, const std::vector<mx::Shape>& shapes, mx::Stream s) {
  const std::size_t heads = static_cast<std::size_t>(options.num_heads + 2 * options.num_kv_heads);
  return launch(kernel_sources::qkv_rope,
                {.inputs = {qkv, positions, freqs, options.norms.value_or(freqs)},
                 .output_shapes = shapes,
                 .output_dtypes = {qkv.dtype(), qkv.dtype(), qkv.dtype()},
                 .constants = {{"T", qkv.dtype()},
                               {"HEADS", options.num_heads},
                               {"KV_HEADS", options.num_kv_heads},
                               {"DIM", shapes[0][2]},
                               {"GATED", options.gated ? 1 : 0},
                               {"HAS_NORMS", options.norms ? 1 : 0},
                               {"EPS_BITS", std::bit_cast<int>(options.eps)},
                               {"LENGTH_FACTOR_BITS", std::bit_cast<int>(options.length_factor)}},
                 .groups = {groups(32 * heads * static_cast<std::size_t>(qkv.shape(0))), 1, 1},
                 .threads = kThreads},
                s);
}

// x [T, H, D] float32, its first features turned
mx::array turn(const mx::array& x, const mx::array& cosines, const mx::array& sines, mx::Stream s) {
  const int tokens = x.shape(0), heads = x.shape(1), d = x.shape(2), half = cosines.shape(2);
  const mx::array a = mx::slice(x, {0, 0, 0}, {tokens, heads, half}, s);
  const mx::array b = mx::slice(x, {0, 0, half}, {tokens, heads, 2 * half}, s);
  return mx::concatenate({mx::subtract(mx::multiply(a, cosines, s), mx::multiply(b, sines, s), s),
                          mx::add(mx::multiply(a, sines, s), mx::multiply(b, cosines, s), s),
                          mx::slice(x, {0, 0, 2 * half}, {tokens, heads, d}, s)},
                         2, s);
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

mx::array silu_mul(const mx::array& x, const std::optional<mx::array>& up, mx::StreamOrDevice s) {
  return gated_mul(x, up, /*is_gelu=*/false, mx::to_stream(s));
}

mx::array gelu_mul(const mx::array& x, const std::optional<mx::array>& up, mx::StreamOrDevice s) {
  return gated_mul(x, up, /*is_gelu=*/true, mx::to_stream(s));
}

std::vector<mx::array> qkv_rope(const mx::array& qkv, const mx::array& positions, const mx::array& freqs,
                                const QkvRopeOptions& options, mx::StreamOrDevice device) {
  const std::vector<mx::Shape> shapes = check_qkv_rope(qkv, positions, freqs, options);
  const mx::Stream s = mx::to_stream(device);
  if (has_gpu_kernel(qkv, s, "qkv_rope")) {
    return qkv_rope_gpu(qkv, positions, freqs, options, shapes, s);
  }
  if (!has_kernel(qkv, s)) {
    return qkv_rope_fallback(qkv, positions, freqs, options, s);
  }
  std::vector<mx::array> inputs{qkv, positions, freqs};
  if (options.norms) {
    inputs.push_back(*options.norms);
  }
  return mx::array::make_arrays(
      shapes, {mx::float32, mx::float32, mx::float32},
      std::make_shared<QkvRopePrimitive>(s, options.eps, options.length_factor, options.gated), inputs);
}

mx::array silu_mul_fallback(const mx::array& x, const std::optional<mx::array>& up_or_none, mx::StreamOrDevice device) {
  const mx::Stream s = mx::to_stream(device);
  const auto [gate, up] = halves(x, up_or_none, s);
  return mx::multiply(mx::multiply(gate, mx::sigmoid(gate, s), s), up, s);
}

mx::array gelu_mul_fallback(const mx::array& both, const std::optional<mx::array>& up_or_none,
                            mx::StreamOrDevice device) {
  const mx::Stream s = mx::to_stream(device);
  const auto [gate, up] = halves(both, up_or_none, s);
  const mx::array x = mx::astype(gate, mx::float32, s);
  const mx::array cubed = mx::multiply(mx::multiply(x, x, s), x, s);
  const mx::array inner = mx::add(x, mx::multiply(cubed, mx::array(0.044715f), s), s);
  const mx::array share = mx::sigmoid(mx::multiply(inner, mx::array(1.5957691216f), s), s);  // 2 * sqrt(2 / pi)
  return mx::multiply(mx::astype(mx::multiply(x, share, s), gate.dtype(), s), up, s);
}

std::vector<mx::array> qkv_rope_fallback(const mx::array& qkv, const mx::array& positions, const mx::array& freqs,
                                         const QkvRopeOptions& options, mx::StreamOrDevice device) {
  const mx::Stream s = mx::to_stream(device);
  const auto shapes = check_qkv_rope(qkv, positions, freqs, options);
  const int tokens = qkv.shape(0), heads = options.num_heads, kv_heads = options.num_kv_heads, d = shapes[0][2];
  const int q_end = heads * (options.gated ? 2 : 1);
  const mx::array all = mx::reshape(qkv, {tokens, q_end + 2 * kv_heads, d}, s);
  const mx::array turns = mx::reshape(mx::astype(positions, mx::float32, s), {tokens, 1, 1}, s);
  const mx::array angles = mx::divide(turns, freqs, s);  // [T, 1, R / 2]
  const mx::array factor(options.length_factor);
  const mx::array cosines = mx::multiply(mx::cos(angles, s), factor, s);
  const mx::array sines = mx::multiply(mx::sin(angles, s), factor, s);
  const auto turned = [&](int begin, int end, int step, int which) {
    mx::array x = mx::astype(mx::slice(all, {0, begin, 0}, {tokens, end, d}, {1, step, 1}, s), mx::float32, s);
    if (options.norms) {
      x = rms_norm(x, mx::take(*options.norms, which, 0, s), options.eps, s);
    }
    return mx::astype(turn(x, cosines, sines, s), qkv.dtype(), s);
  };
  return {turned(0, q_end, options.gated ? 2 : 1, 0), turned(q_end, q_end + kv_heads, 1, 1),
          mx::slice(all, {0, q_end + kv_heads, 0}, {tokens, q_end + 2 * kv_heads, d}, s)};
}

}  // namespace mlx_server
