#include "paged_attention/attention_batch.h"

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>
#include <utility>

#include <mlx/utils.h>

#include "common/op_error.h"
#include "kernels/kernel_use.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

constexpr int kPrefillQueries = 8;  // with fewer, reading the context for each query alone is faster
constexpr int kMaxSplits = 4096;    // of a launch: each takes a float for each feature of its query

// Integers, `columns` in each row.
template <int kColumns>
mx::array int_array(const std::vector<std::array<int, kColumns>>& rows) {
  return mx::array(rows.data()->data(), {static_cast<int>(rows.size()), kColumns}, mx::int32);
}

// The splits of queries, cut into launches.
class DecodeBuilder {
 public:
  // The query of `token`, which sees keys [begin, end).
  void add(int table, int token, int begin, int end) {
    const int first = static_cast<int>(splits_.size());
    while (begin < end) {
      const int split_end = std::min((begin / kAttentionSplit + 1) * kAttentionSplit, end);
      splits_.push_back({table, token, begin, split_end});
      begin = split_end;
    }
    queries_.push_back({first, static_cast<int>(splits_.size()) - first});
    if (splits_.size() >= kMaxSplits) {
      flush();
    }
  }

  std::vector<DecodeTables> finish() {
    flush();
    return std::move(tables_);
  }

 private:
  void flush() {
    if (!queries_.empty()) {
      tables_.push_back({int_array<4>(splits_), int_array<2>(queries_)});
      splits_.clear();
      queries_.clear();
    }
  }

  std::vector<std::array<int, 4>> splits_;
  std::vector<std::array<int, 2>> queries_;
  std::vector<DecodeTables> tables_;
};

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
  DecodeBuilder decodes;
  std::vector<std::array<int, 6>> tiles;
  std::vector<int> tokens, prefill_tokens;
  for (int b = 0, token = 0; b < num_rows(); token += query_lens_[b++]) {
    const int query_len = query_lens_[b], first_pos = context_lens_[b] - query_len;
    const int table = b * block_tables_.shape(1);
    const bool is_one_by_one = query_len < kPrefillQueries || is_batch_invariant();
    for (int i = 0; is_one_by_one && i < query_len; ++i) {
      const int end = first_pos + i + 1;
      decodes.add(table, token + i, std::max(0, end - window), end);
      tokens.push_back(token + i);
    }
    for (int i = 0; !is_one_by_one && i < query_len; ++i) {
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
  tables.decodes = decodes.finish();
  if (!tiles.empty()) {
    tables.tiles = int_array<6>(tiles);
  }
  tables.num_prefill_tokens = static_cast<int>(prefill_tokens.size());
  tokens.insert(tokens.end(), prefill_tokens.begin(), prefill_tokens.end());
  tables.order = order_of(tokens);
  return tables;
}

}  // namespace mlx_server
