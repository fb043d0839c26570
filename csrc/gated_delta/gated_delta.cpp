#include "gated_delta/gated_delta.h"

#include "common/op_error.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

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

}  // namespace

std::tuple<mx::array, mx::array, mx::array> gated_delta(const GatedDeltaInputs& in, mx::StreamOrDevice s_) {
  check(in);
  return gated_delta_fallback(in, mx::to_stream(s_));
}

}  // namespace mlx_server
