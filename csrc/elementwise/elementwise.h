// The small ops between matrix products. On the CPU MLX composes each of them of many passes over the data.
#pragma once

#include <optional>
#include <vector>

#include <mlx/array.h>
#include <mlx/utils.h>

namespace mlx_server {

// x / sqrt(mean(x^2) + eps) * weight over the last axis
// x [..., D], weight [D]  ->  [..., D]
mlx::core::array rms_norm(const mlx::core::array& x, const mlx::core::array& weight, float eps,
                          mlx::core::StreamOrDevice s = {});

// gate * sigmoid(gate) * up, all of one shape; without up, x holds both in halves of its last axis
// x [..., N] and up [..., N], or x [..., 2 N]  ->  [..., N]
mlx::core::array silu_mul(const mlx::core::array& x, const std::optional<mlx::core::array>& up = {},
                          mlx::core::StreamOrDevice s = {});

// Likewise gate * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate^3))) / 2 * up
mlx::core::array gelu_mul(const mlx::core::array& x, const std::optional<mlx::core::array>& up = {},
                          mlx::core::StreamOrDevice s = {});

// What qkv_rope does to queries and keys, of H and Hk heads of D features.
struct QkvRopeOptions {
  int num_heads, num_kv_heads;
  std::optional<mlx::core::array> norms;  // float32 [2, D]: RMSNorm's weights of each query and of each key
  float eps = 0;                          // of the norms
  float length_factor = 1;                // of the features that turn
  bool gated = false;                     // after each query lies a gate of its size, which is left out
};

// Queries, keys and values out of one product; of queries and keys feature i and i + R / 2 of each head, i < R / 2, are
// a pair that turns by positions[t] / freqs[i]
// qkv [T, (H + 2 Hk) * D], gated [T, (2 H + 2 Hk) * D], positions int32 [T], freqs float32 [R / 2]
// ->  q [T, H, D], k [T, Hk, D], v [T, Hk, D]
std::vector<mlx::core::array> qkv_rope(const mlx::core::array& qkv, const mlx::core::array& positions,
                                       const mlx::core::array& freqs, const QkvRopeOptions& options,
                                       mlx::core::StreamOrDevice s = {});

// The same in MLX's own ops, on any device.
mlx::core::array silu_mul_fallback(const mlx::core::array& x, const std::optional<mlx::core::array>& up = {},
                                   mlx::core::StreamOrDevice s = {});
mlx::core::array gelu_mul_fallback(const mlx::core::array& x, const std::optional<mlx::core::array>& up = {},
                                   mlx::core::StreamOrDevice s = {});
std::vector<mlx::core::array> qkv_rope_fallback(const mlx::core::array& qkv, const mlx::core::array& positions,
                                                const mlx::core::array& freqs, const QkvRopeOptions& options,
                                                mlx::core::StreamOrDevice s = {});

}  // namespace mlx_server
