// The small ops between matrix products. On the CPU MLX composes each of them of many passes over the data.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

namespace mlx_server {

// x / sqrt(mean(x^2) + eps) * weight over the last axis
// x [..., D], weight [D]  ->  [..., D]
mlx::core::array rms_norm(const mlx::core::array& x, const mlx::core::array& weight, float eps,
                          mlx::core::StreamOrDevice s = {});

// gate * sigmoid(gate) * up, all of one shape
mlx::core::array silu_mul(const mlx::core::array& gate, const mlx::core::array& up, mlx::core::StreamOrDevice s = {});

// gate * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate^3))) / 2 * up, all of one shape
mlx::core::array gelu_mul(const mlx::core::array& gate, const mlx::core::array& up, mlx::core::StreamOrDevice s = {});

// Pair i of each head's features turned by positions[t] / freqs[i]: features (i, i + R / 2), or (2i, 2i + 1) if
// traditional x [T, H, D], positions int32 [T], freqs float32 [R / 2]  ->  [T, H, D]
mlx::core::array rope(const mlx::core::array& x, const mlx::core::array& positions, const mlx::core::array& freqs,
                      bool traditional, mlx::core::StreamOrDevice s = {});

// The same in MLX's own ops, on any device.
mlx::core::array silu_mul_fallback(const mlx::core::array& gate, const mlx::core::array& up,
                                   mlx::core::StreamOrDevice s = {});
mlx::core::array gelu_mul_fallback(const mlx::core::array& gate, const mlx::core::array& up,
                                   mlx::core::StreamOrDevice s = {});
mlx::core::array rope_fallback(const mlx::core::array& x, const mlx::core::array& positions,
                               const mlx::core::array& freqs, bool traditional, mlx::core::StreamOrDevice s = {});

}  // namespace mlx_server
