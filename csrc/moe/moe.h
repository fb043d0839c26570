// Mixture of experts: which experts compute each token, and what they compute.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include <mlx/array.h>
#include <mlx/utils.h>

namespace mlx_server {

// One projection of all E experts, stacked. Plain if there are no scales, else as mx.quantize stores it.
struct ExpertMatrix {
  mlx::core::array weight;                 // floating point [E, N, K], or uint32 [E, N, K * bits / 32]
  std::optional<mlx::core::array> scales;  // [E, N, K / group_size]
  std::optional<mlx::core::array> biases;  // like scales; the affine mode has them
  int group_size = 0, bits = 0;
  std::string mode = "affine";
};

enum class Scoring { kSoftmax, kSigmoid };

// logits [T, E]  ->  experts int32 [T, top_k], best first, lower ids first among equals; weights float32 [T, top_k]
std::pair<mlx::core::array, mlx::core::array> route(const mlx::core::array& logits, int top_k, Scoring scoring,
                                                    bool normalize, mlx::core::StreamOrDevice s = {});

// sum over j of weights[t, j] * down_e(silu(gate_e(x[t])) * up_e(x[t])) with e = experts[t, j], plus shared[t]
// x, shared [T, D]; experts int32, weights float32 [T, top_k]; gate, up [E, N, D]; down [E, D, N]  ->  [T, D]
mlx::core::array moe_mlp(const mlx::core::array& x, const mlx::core::array& experts, const mlx::core::array& weights,
                         const ExpertMatrix& gate, const ExpertMatrix& up, const ExpertMatrix& down,
                         const std::optional<mlx::core::array>& shared, mlx::core::StreamOrDevice s = {});

// The specifications of both in MLX's own ops; arguments are valid.
std::pair<mlx::core::array, mlx::core::array> route_fallback(const mlx::core::array& logits, int top_k, Scoring scoring,
                                                             bool normalize, mlx::core::StreamOrDevice s = {});
mlx::core::array moe_mlp_fallback(const mlx::core::array& x, const mlx::core::array& experts,
                                  const mlx::core::array& weights, const ExpertMatrix& gate, const ExpertMatrix& up,
                                  const ExpertMatrix& down, const std::optional<mlx::core::array>& shared,
                                  mlx::core::StreamOrDevice s = {});

}  // namespace mlx_server
