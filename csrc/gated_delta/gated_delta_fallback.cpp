#include "gated_delta/gated_delta.h"

#include <cmath>

#include <mlx/ops.h>

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr float kNormEps = 1e-6f;  // of the squared length, as in the paper's own code

mx::array silu(const mx::array& x, mx::Stream s) { return mx::multiply(x, mx::sigmoid(x, s), s); }

// x [T, H, D], each head of length 1
mx::array l2_norm(const mx::array& x, mx::Stream s) {
  const auto squares = mx::sum(mx::square(x, s), -1, /*keepdims=*/true, s);
  return mx::multiply(x, mx::rsqrt(mx::add(squares, mx::array(kNormEps), s), s), s);
}

// Row `slot` of a state [S, ...] in float32; zeros for a fresh row.
mx::array row_state(const mx::array& states, const mx::array& slot, bool fresh, mx::Stream s) {
  const auto state = mx::astype(mx::take(states, slot, 0, s), mx::float32, s);
  return fresh ? mx::zeros_like(state, s) : state;
}

// x [K - 1 + n, C], weight [C, K]  ->  [n, C]
mx::array causal_conv(const mx::array& x, const mx::array& weight, mx::Stream s) {
  const int taps = weight.shape(1), channels = weight.shape(0), n = x.shape(0) - taps + 1;
  auto sum = mx::zeros({n, channels}, mx::float32, s);
  for (int i = 0; i < taps; ++i) {
    const auto tap = mx::squeeze(mx::slice(weight, {0, i}, {channels, i + 1}, s), 1, s);  // [C]
    sum = mx::add(sum, mx::multiply(mx::slice(x, {i, 0}, {i + n, channels}, s), tap, s), s);
  }
  return sum;
}

// x [T, C]: heads of d from channel `first` on, each `repeats` times  ->  [T, heads * repeats, d]
mx::array heads_of(const mx::array& x, int first, int heads, int d, int repeats, mx::Stream s) {
  const auto part = mx::slice(x, {0, first}, {x.shape(0), first + heads * d}, s);
  return mx::repeat(mx::reshape(part, {x.shape(0), heads, d}, s), repeats, 1, s);
}

// Token t of x [T, H, ...]  ->  [H, ...]
mx::array token(const mx::array& x, int t, mx::Stream s) { return mx::take(x, t, 0, s); }

struct Row {
  mx::array q, k, v;      // [n, Hv, Dk], [n, Hv, Dk], [n, Hv, Dv]
  mx::array decay, beta;  // [n, Hv]
  mx::array state;        // [Hv, Dv, Dk]
};

// Applies the delta rule to the row's tokens one after the other and leaves the last state in row.state  ->  [n, Hv,
// Dv]
mx::array delta_rule(Row& row, mx::Stream s) {
  std::vector<mx::array> outputs;
  for (int t = 0; t < row.q.shape(0); ++t) {
    const auto q = mx::expand_dims(token(row.q, t, s), -1, s);  // [Hv, Dk, 1]
    const auto k = mx::expand_dims(token(row.k, t, s), -1, s);  // [Hv, Dk, 1]
    const auto v = mx::expand_dims(token(row.v, t, s), -1, s);  // [Hv, Dv, 1]
    const auto decay = mx::expand_dims(token(row.decay, t, s), {1, 2}, s),
               beta = mx::expand_dims(token(row.beta, t, s), {1, 2}, s);
    row.state = mx::multiply(row.state, decay, s);
    const auto delta = mx::multiply(mx::subtract(v, mx::matmul(row.state, k, s), s), beta, s);  // [Hv, Dv, 1]
    row.state = mx::add(row.state, mx::multiply(delta, mx::swapaxes(k, 1, 2, s), s), s);
    outputs.push_back(mx::squeeze(mx::matmul(row.state, q, s), -1, s));  // [Hv, Dv]
  }
  return mx::stack(outputs, 0, s);
}

}  // namespace

std::tuple<mx::array, mx::array, mx::array> gated_delta_fallback(const GatedDeltaInputs& in, mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  const int channels = in.qkv.shape(1), taps = in.conv_weight.shape(1), heads = in.a.shape(1);
  const int key_heads = in.num_key_heads, key_dim = in.key_head_dim, group = heads / key_heads;
  const auto f32 = [&](const mx::array& x) { return mx::astype(x, mx::float32, s); };
  const auto log1p_exp = mx::logaddexp(f32(mx::add(f32(in.a), f32(in.dt_bias), s)), mx::array(0.0f), s);
  const auto decay = mx::exp(mx::negative(mx::multiply(mx::exp(f32(in.a_log), s), log1p_exp, s), s), s);  // [T, Hv]
  const auto beta = mx::sigmoid(f32(in.b), s);                                                            // [T, Hv]
  const auto weight = f32(in.conv_weight), qkv = f32(in.qkv);
  std::vector<mx::array> outputs, conv_states, states;
  int begin = 0;
  for (std::size_t b = 0; b < in.query_lens.size(); ++b) {
    const int n = in.query_lens[b], end = begin + n;
    const auto slot = mx::take(in.slots, static_cast<int>(b), 0, s);
    const auto x = mx::concatenate(
        {row_state(in.conv_state, slot, in.fresh[b], s), mx::slice(qkv, {begin, 0}, {end, channels}, s)}, 0, s);
    conv_states.push_back(mx::slice(x, {n, 0}, {n + taps - 1, channels}, s));
    const auto mixed = silu(causal_conv(x, weight, s), s);  // [n, C]
    Row row{.q = mx::multiply(l2_norm(heads_of(mixed, 0, key_heads, key_dim, group, s), s),
                              mx::array(1 / std::sqrt(static_cast<float>(key_dim))), s),
            .k = l2_norm(heads_of(mixed, key_heads * key_dim, key_heads, key_dim, group, s), s),
            .v = heads_of(mixed, 2 * key_heads * key_dim, heads, in.state.shape(2), 1, s),
            .decay = mx::slice(decay, {begin, 0}, {end, heads}, s),
            .beta = mx::slice(beta, {begin, 0}, {end, heads}, s),
            .state = row_state(in.state, slot, in.fresh[b], s)};
    outputs.push_back(delta_rule(row, s));
    states.push_back(row.state);
    begin = end;
  }
  const auto write = [&](const mx::array& all, const std::vector<mx::array>& rows) {
    const auto values = mx::astype(mx::expand_dims(mx::stack(rows, 0, s), 1, s), all.dtype(), s);  // [B, 1, ...]
    return mx::scatter(all, in.slots, values, 0, s);
  };
  return {mx::astype(mx::concatenate(outputs, 0, s), in.qkv.dtype(), s), write(in.conv_state, conv_states),
          write(in.state, states)};
}

}  // namespace mlx_server
