#include "paged_attention/attention_batch.h"

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>
#include <utility>

#include <mlx/utils.h>

#include "common/op_error.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr int kPrefillQueries = 8;  // with fewer, reading the context for each query alone is faster

// Integers, `columns` in each row. None if there are no rows.
template <int kColumns>
std::optional<mx::array> int_array(const std::vector<std::array<int, kColumns>>& rows) {
  if (rows.empty()) {
    return std::nullopt;
  }
  return mx::array(rows.data()->data(), {static_cast<int>(rows.size()), kColumns}, mx::int32);
}

// Where each of the tokens is.
std::optional<mx::array> order_of(const std::vector<int>& tokens) {
  if (std::ranges::is_sorted(tokens)) {
    return std::nullopt;
  }
  std::vector<int> order(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    order[tokens[i]] = static_cast<int>(i);
  }
  return mx::array(order.data(), {static_cast<int>(order.size())}, mx::int32);
}

}  // namespace

AttentionBatch::AttentionBatch(mx::array block_tables, std::vector<int> query_lens, std::vector<int> context_lens)
    : block_tables_(std::move(block_tables)),
      query_lens_(std::move(query_lens)),
      context_lens_(std::move(context_lens)) {
  constexpr char op[] = "AttentionBatch";
  if (block_tables_.ndim() != 2 || block_tables_.dtype() != mx::int32) {
    op_error(op, "block_tables must be int32 [B, M] but got ", block_tables_.dtype(), " ", block_tables_.shape());
  }
  const auto num_rows = static_cast<std::size_t>(block_tables_.shape(0));
  if (query_lens_.size() != num_rows || context_lens_.size() != num_rows) {
    op_error(op, "query_lens and context_lens must have one entry for each of the ", num_rows,
             " rows of block_tables but got ", query_lens_.size(), " and ", context_lens_.size());
  }
  for (std::size_t b = 0; b < num_rows; ++b) {
    if (query_lens_[b] < 1 || query_lens_[b] > context_lens_[b]) {
      op_error(op, "rows need 1 <= query_len <= context_len but row ", b, " got query_len ", query_lens_[b],
               " and context_len ", context_lens_[b]);
    }
  }
  num_tokens_ = std::accumulate(query_lens_.begin(), query_lens_.end(), 0);
}

const AttentionTables& AttentionBatch::tables(int window, int tile_queries) const {
  const std::pair key{window, tile_queries};
  const auto known = tables_.find(key);
  return known != tables_.end() ? known->second : tables_.emplace(key, make_tables(window, tile_queries)).first->second;
}

AttentionTables AttentionBatch::make_tables(int window, int tile_queries) const {
  AttentionTables tables;
  std::vector<std::array<int, 4>> splits;
  std::vector<std::array<int, 2>> queries;
  std::vector<std::array<int, 6>> tiles;
  std::vector<int> tokens, prefill_tokens;
  for (int b = 0, token = 0; b < num_rows(); token += query_lens_[b++]) {
    const int query_len = query_lens_[b], first_pos = context_lens_[b] - query_len;
    const int table = b * block_tables_.shape(1);
    for (int i = 0; query_len < kPrefillQueries && i < query_len; ++i) {
      const int end = first_pos + i + 1, first_split = static_cast<int>(splits.size());
      for (int begin = std::max(0, end - window); begin < end;) {
        const int split_end = std::min((begin / kAttentionSplit + 1) * kAttentionSplit, end);
        splits.push_back({table, token + i, begin, split_end});
        begin = split_end;
      }
      queries.push_back({first_split, static_cast<int>(splits.size()) - first_split});
      tokens.push_back(token + i);
    }
    for (int i = 0; query_len >= kPrefillQueries && i < query_len; ++i) {
      if (i % tile_queries == 0) {
        const int num_queries = std::min(tile_queries, query_len - i);
        tiles.push_back(
            {table, token + i, static_cast<int>(prefill_tokens.size()), num_queries, first_pos + i, window});
      }
      prefill_tokens.push_back(token + i);
    }
  }
  // The last queries of a prompt see most keys: the longest first.
  std::ranges::stable_sort(tiles, std::greater<>{}, [](const auto& tile) { return tile[4]; });
  tables.splits = int_array<4>(splits);
  tables.queries = int_array<2>(queries);
  tables.tiles = int_array<6>(tiles);
  tables.num_prefill_tokens = static_cast<int>(prefill_tokens.size());
  tokens.insert(tokens.end(), prefill_tokens.begin(), prefill_tokens.end());
  tables.order = order_of(tokens);
  return tables;
}

}  // namespace mlx_server
