// Attention over a KV cache that lies in fixed-size blocks of one pool (Kwon et al. 2023, "PagedAttention").
#pragma once

#include <optional>

#include <mlx/array.h>
#include <mlx/utils.h>

#include "paged_attention/attention_batch.h"
#include "paged_attention/kv_pool.h"

namespace mlx_server {

struct AttentionOptions {
  float scale;                            // of the scores
  std::optional<int> window;              // a query sees only the newest `window` tokens, itself included
  std::optional<float> softcap;           // scores become softcap * tanh(score / softcap)
  std::optional<mlx::core::array> sinks;  // [H]: a score more in each head's softmax, of a value that is zero
};

// Causal attention of a ragged batch: q [T, H, D] -> [T, H, D]. Blocks that no query of a row sees are not read.
mlx::core::array paged_attention(const mlx::core::array& q, const KVPool& pool, const AttentionBatch& batch,
                                 const AttentionOptions& options, mlx::core::StreamOrDevice s = {});

// The specification: the same from MLX's own ops, in float32, on any device and for any floating point dtype.
mlx::core::array paged_attention_fallback(const mlx::core::array& q, const KVPool& pool, const AttentionBatch& batch,
                                          const AttentionOptions& options, mlx::core::StreamOrDevice s = {});

// The same with portable kernels, for head sizes 8 to 256.
mlx::core::array paged_attention_gpu(const mlx::core::array& q, const KVPool& pool, const AttentionBatch& batch,
                                     const AttentionOptions& options, mlx::core::Stream s);

}  // namespace mlx_server
