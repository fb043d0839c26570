// The linear attention of Qwen3-Next: a short causal convolution, then the gated delta rule (Yang, Kautz and
// Hatamizadeh 2024, "Gated Delta Networks", arXiv 2412.06464).
#pragma once

#include <tuple>
#include <vector>

#include <mlx/array.h>
#include <mlx/utils.h>

namespace mlx_server {

// Letters: T tokens of all rows, B rows, S slots, Hk key heads of Dk, Hv value heads of Dv, K taps of the convolution,
// C = 2 Hk Dk + Hv Dv channels: queries, keys, values.
struct GatedDeltaInputs {
  mlx::core::array qkv;             // [T, C] before the convolution
  mlx::core::array conv_weight;     // [C, K], the last tap meets the token itself
  mlx::core::array a, b;            // [T, Hv]
  mlx::core::array a_log, dt_bias;  // [Hv]
  mlx::core::array conv_state;      // [S, K - 1, C]: the last rows of qkv
  mlx::core::array state;           // float32 [S, Hv, Dv, Dk]
  mlx::core::array slots;           // int32 [B], distinct
  std::vector<int> query_lens;      // [B]
  std::vector<bool> fresh;          // [B]: the row begins, whatever lies in its slot
  int num_key_heads, key_head_dim;
};

// y [T, Hv, Dv] in qkv's dtype, conv_state, state. For each row and value head, with c = silu(causal conv of qkv) split
// in q, k, v, beta = sigmoid(b) and g = -exp(a_log) * softplus(a + dt_bias):
//   q = l2norm(q) / sqrt(Dk), k = l2norm(k), S = exp(g) * S, S += beta * (v - S k) k^T, y = S q
// The states that are returned take over the memory of the given ones, which must not be used again.
std::tuple<mlx::core::array, mlx::core::array, mlx::core::array> gated_delta(const GatedDeltaInputs& in,
                                                                             mlx::core::StreamOrDevice s = {});

// The specification: the same, token by token, from MLX's own ops.
std::tuple<mlx::core::array, mlx::core::array, mlx::core::array> gated_delta_fallback(const GatedDeltaInputs& in,
                                                                                      mlx::core::StreamOrDevice s = {});

}  // namespace mlx_server
