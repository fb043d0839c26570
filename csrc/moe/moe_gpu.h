// What `route` and `moe_mlp` launch on a GPU stream; arguments are valid.
#pragma once

#include <optional>
#include <utility>

#include "moe/moe.h"

namespace mlx_server {

std::pair<mlx::core::array, mlx::core::array> route_gpu(const mlx::core::array& logits, int top_k, Scoring scoring,
                                                        bool normalize, mlx::core::Stream s);

mlx::core::array moe_mlp_gpu(const mlx::core::array& x, const mlx::core::array& experts,
                             const mlx::core::array& weights, const ExpertMatrix& gate, const ExpertMatrix& up,
                             const ExpertMatrix& down, const std::optional<mlx::core::array>& shared,
                             mlx::core::Stream s);

// What experts compute: rows [T * k, D], and for each token and its j-th expert which of them is theirs, uint32 [T *
// k].
struct ExpertRows {
  mlx::core::array rows, row_of_pair;
};

// In MLX's own ops. sorted: rows lie in the order of the experts, so that each expert's matrices are read once.
ExpertRows expert_rows(const mlx::core::array& x, const mlx::core::array& experts, const ExpertMatrix& gate,
                       const ExpertMatrix& up, const ExpertMatrix& down, bool sorted, mlx::core::Stream s);

}  // namespace mlx_server
