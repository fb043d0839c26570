#include "gated_delta/gated_delta.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "common/op_error.h"
#include "common/row_contiguous.h"
#include "common/thread_pool.h"
#include "gated_delta/gated_delta_cpu.h"
#include "gated_delta/gated_delta_gpu.h"
#include "kernels/kernel_use.h"
#include "kernels/launch.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

using Outputs = std::tuple<mx::array, mx::array, mx::array>;

void check_shape(const char* name, const mx::array& a, const mx::Shape& shape) {
  if (a.shape() != shape || !mx::issubdtype(a.dtype(), mx::floating)) {
    op_error("gated_delta", name, " must be floating point ", shape, " but got ", a.dtype(), " ", a.shape());
  }
}

void check_rows(const GatedDeltaInputs& in) {
  const auto num_rows = static_cast<int>(in.query_lens.size());
  if (in.slots.shape() != mx::Shape{num_rows} || in.slots.dtype() != mx::int32 ||
      static_cast<int>(in.fresh.size()) != num_rows || num_rows == 0) {
    op_error("gated_delta", "slots must be int32 [B] and query_lens and fresh have B > 0 entries but got ",
             in.slots.dtype(), " ", in.slots.shape(), ", ", num_rows, " and ", in.fresh.size());
  }
  int num_tokens = 0;
  for (const int n : in.query_lens) {
    if (n < 1) {
      op_error("gated_delta", "query_lens must be at least 1 but got ", n);
    }
    num_tokens += n;
  }
  if (num_tokens != in.qkv.shape(0)) {
    op_error("gated_delta", "query_lens must add up to qkv's ", in.qkv.shape(0), " tokens but got ", num_tokens);
  }
}

void check(const GatedDeltaInputs& in) {
  const int key_heads = in.num_key_heads, key_dim = in.key_head_dim;
  if (in.qkv.ndim() != 2 || in.conv_weight.ndim() != 2 || in.conv_weight.shape(1) < 2 || in.state.ndim() != 4 ||
      in.state.dtype() != mx::float32) {
    op_error("gated_delta", "qkv must be [T, C], conv_weight [C, K > 1] and state float32 [S, Hv, Dv, Dk] but got ",
             in.qkv.shape(), ", ", in.conv_weight.shape(), " and ", in.state.dtype(), " ", in.state.shape());
  }
  const int slots = in.state.shape(0), heads = in.state.shape(1), value_dim = in.state.shape(2);
  if (key_heads < 1 || heads % key_heads != 0 || in.state.shape(3) != key_dim) {
    op_error("gated_delta", "state must be [S, Hv, Dv, ", key_dim, "] with Hv a multiple of ", key_heads, " but got ",
             in.state.shape());
  }
  const int tokens = in.qkv.shape(0), channels = 2 * key_heads * key_dim + heads * value_dim;
  const int taps = in.conv_weight.shape(1);
  check_shape("qkv", in.qkv, {tokens, channels});
  check_shape("conv_weight", in.conv_weight, {channels, taps});
  check_shape("conv_state", in.conv_state, {slots, taps - 1, channels});
  check_shape("a", in.a, {tokens, heads});
  check_shape("b", in.b, {tokens, heads});
  check_shape("a_log", in.a_log, {heads});
  check_shape("dt_bias", in.dt_bias, {heads});
  check_rows(in);
}

// inputs: the arrays of GatedDeltaInputs in their order. outputs: y, conv_state, state
class GatedDeltaPrimitive : public mx::Primitive {
 public:
  GatedDeltaPrimitive(mx::Stream stream, const GatedDeltaInputs& in)
      : Primitive(stream),
        query_lens_(in.query_lens),
        fresh_(in.fresh.begin(), in.fresh.end()),
        num_key_heads_(in.num_key_heads),
        one_by_one_(is_batch_invariant()) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    std::vector<mx::array> arrays;
    for (const mx::array& input : inputs) {
      arrays.push_back(row_contiguous(input, stream()));
    }
    auto& encoder = mx::cpu::get_command_encoder(stream());
    outputs[0].set_data(mx::allocator::malloc(outputs[0].nbytes()));
    outputs[1].copy_shared_buffer(arrays[6]);
    outputs[2].copy_shared_buffer(arrays[7]);
    mx::array mixed(arrays[0].shape(), mx::float32, nullptr, {});
    mixed.set_data(mx::allocator::malloc(mixed.nbytes()));
    encoder.add_temporary(mixed);
    GatedDelta op{.qkv = arrays[0].data<float>(),
                  .conv_weight = arrays[1].data<float>(),
                  .a = arrays[2].data<float>(),
                  .b = arrays[3].data<float>(),
                  .a_log = arrays[4].data<float>(),
                  .dt_bias = arrays[5].data<float>(),
                  .conv_state = outputs[1].data<float>(),
                  .state = outputs[2].data<float>(),
                  .slots = arrays[8].data<std::int32_t>(),
                  .mixed = mixed.data<float>(),
                  .y = outputs[0].data<float>(),
                  .query_lens = {},
                  .fresh = {},
                  .taps = arrays[1].shape(1),
                  .num_key_heads = num_key_heads_,
                  .num_value_heads = arrays[7].shape(1),
                  .key_dim = arrays[7].shape(3),
                  .value_dim = arrays[7].shape(2),
                  .one_by_one = one_by_one_};
    encoder.dispatch([op, query_lens = query_lens_, fresh = fresh_]() mutable {
      op.query_lens = query_lens;
      op.fresh = fresh;
      gated_delta(op, ThreadPool::shared());
    });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    op_error("gated_delta", "the primitive must run on a CPU stream but got a GPU stream");
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const GatedDeltaPrimitive&>(other);
    return query_lens_ == o.query_lens_ && fresh_ == o.fresh_ && num_key_heads_ == o.num_key_heads_ &&
           one_by_one_ == o.one_by_one_;
  }

  DEFINE_NAME(GatedDelta)

 private:
  std::vector<int> query_lens_;
  std::vector<char> fresh_;
  int num_key_heads_;
  bool one_by_one_;
};

Outputs gated_delta_cpu(const GatedDeltaInputs& in, mx::Stream s) {
  const auto f32 = [&](const mx::array& a) { return mx::astype(a, mx::float32, s); };
  const mx::Shape y_shape{in.qkv.shape(0), in.state.shape(1), in.state.shape(2)};
  const auto outputs =
      mx::array::make_arrays({y_shape, in.conv_state.shape(), in.state.shape()},
                             {mx::float32, mx::float32, mx::float32}, std::make_shared<GatedDeltaPrimitive>(s, in),
                             {f32(in.qkv), f32(in.conv_weight), f32(in.a), f32(in.b), f32(in.a_log), f32(in.dt_bias),
                              f32(in.conv_state), in.state, in.slots});
  return {mx::astype(outputs[0], in.qkv.dtype(), s), mx::astype(outputs[1], in.conv_state.dtype(), s), outputs[2]};
}

}  // namespace

std::tuple<mx::array, mx::array, mx::array> gated_delta(const GatedDeltaInputs& in, mx::StreamOrDevice s_) {
  check(in);
  const auto s = mx::to_stream(s_);
  if (is_gpu(s)) {
    return in.state.size() < 8 ? gated_delta_fallback(in, s) : gated_delta_gpu(in, s);
  }
  const bool has_kernel = in.key_head_dim % 8 == 0 && in.state.shape(2) % 8 == 0;
  return has_kernel ? gated_delta_cpu(in, s) : gated_delta_fallback(in, s);
}

}  // namespace mlx_server
