// Where the rows of a ragged batch lie. Made once for a step, used by the attention of all its layers.
#pragma once

#include <map>
#include <optional>
#include <utility>
#include <vector>

#include <mlx/array.h>

namespace mlx_server {

// Queries for one launch of attention_decode.
struct DecodeTables {
  mlx::core::array splits;   // [S, 4], see attention_decode.kernel
  mlx::core::array queries;  // [Q, 2], see attention_combine.kernel
};

// What the GPU kernels know of a batch: rows of few queries, or all in the batch-invariant mode, go query by query
// through attention_decode, the others through attention_prefill.
struct AttentionTables {
  std::vector<DecodeTables> decodes;
  std::optional<mlx::core::array> tiles;  // [N, 6], see attention_prefill.kernel
  int num_prefill_tokens = 0;
  std::optional<mlx::core::array> order;  // [T]: where each token is in both outputs; none if they are in order
};

class AttentionBatch {
 public:
  // Row b's query_lens[b] queries are the last of its context_lens[b] tokens, whose keys and values lie in the blocks
  // block_tables[b, 0 …]; further entries of the table are not read. block_tables is int32 [B, M].
  AttentionBatch(mlx::core::array block_tables, std::vector<int> query_lens, std::vector<int> context_lens);

  const mlx::core::array& block_tables() const { return block_tables_; }
  const std::vector<int>& query_lens() const { return query_lens_; }
  const std::vector<int>& context_lens() const { return context_lens_; }
  int num_rows() const { return block_tables_.shape(0); }
  int num_tokens() const { return num_tokens_; }  // T

  // For queries that see the newest `window` tokens, tile_queries of which are a tile. Kept, so not thread safe.
  const AttentionTables& tables(int window, int tile_queries) const;

 private:
  AttentionTables make_tables(int window, int tile_queries) const;

  mlx::core::array block_tables_;
  std::vector<int> query_lens_, context_lens_;
  int num_tokens_ = 0;
  mutable std::map<std::pair<int, int>, AttentionTables> tables_;
};

constexpr int kAttentionSplit = 256;  // tokens of the context that a group of attention_decode takes

}  // namespace mlx_server
