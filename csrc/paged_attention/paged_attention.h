// Attention over a KV cache that lies in fixed-size blocks of one pool (Kwon et al. 2023, "PagedAttention").
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include <mlx/array.h>
#include <mlx/utils.h>

namespace mlx_server {

// Stores keys and values k, v [T, Hk, D] in the pools [N, block_size, Hk, D] and returns the new pools. Token t goes to
// slot slot_mapping[t] = block * block_size + offset; slots are distinct. The result takes
// over the pools' memory (common/write_rows.h).
std::pair<mlx::core::array, mlx::core::array> write_kv(const mlx::core::array& k_pool, const mlx::core::array& v_pool,
                                                       const mlx::core::array& k, const mlx::core::array& v,
                                                       const mlx::core::array& slot_mapping,
                                                       mlx::core::StreamOrDevice s = {});

// Causal attention of a ragged batch. Row b's query_lens[b] queries are the last of its context_lens[b] tokens, whose
// keys and values lie in the blocks block_tables[b, 0 …]; further entries of the table are not read. With a window, a
// query sees only the newest `window` tokens, itself included, and blocks that no query of a row sees are not read.
// q [T, H, D] with T = sum(query_lens), pools [N, block_size, Hk, D], block_tables int32 [B, M]  ->  [T, H, D]
mlx::core::array paged_attention(const mlx::core::array& q, const mlx::core::array& k_pool,
                                 const mlx::core::array& v_pool, const mlx::core::array& block_tables,
                                 const std::vector<int>& query_lens, const std::vector<int>& context_lens, float scale,
                                 std::optional<int> window = {}, mlx::core::StreamOrDevice s = {});

// The specification: the same from MLX's own ops, on any device and for any floating point dtype.
mlx::core::array paged_attention_fallback(const mlx::core::array& q, const mlx::core::array& k_pool,
                                          const mlx::core::array& v_pool, const mlx::core::array& block_tables,
                                          const std::vector<int>& query_lens, const std::vector<int>& context_lens,
                                          float scale, std::optional<int> window = {},
                                          mlx::core::StreamOrDevice s = {});

}  // namespace mlx_server
