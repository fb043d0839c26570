#include <algorithm>
#include <cmath>

#include <mlx/ops.h>

#include "paged_attention/paged_attention.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

// One row's part of the batch: queries [query_begin, query_end) of q are the last of the tokens [0, context_len).
struct Row {
  int index, query_begin, query_end, context_len;
};

// Tokens [first, context_len) of the row from an array [N, block_size, ...], as float32.
mx::array gather_tokens(const mx::array& array, const mx::array& block_tables, const Row& row, int first,
                        mx::Stream s) {
  const int block_size = array.shape(1), first_block = first / block_size;
  const int end_block = (row.context_len + block_size - 1) / block_size, skipped = first_block * block_size;
  const auto blocks = mx::flatten(mx::slice(block_tables, {row.index, first_block}, {row.index + 1, end_block}, s), s);
  const auto tokens = mx::flatten(mx::take(array, blocks, 0, s), 0, 1, s);
  const auto range = mx::arange(first - skipped, row.context_len - skipped, mx::int32, s);
  return mx::astype(mx::take(tokens, range, 0, s), mx::float32, s);
}

// Keys or values of these tokens, [Hk, 1, tokens, D].
mx::array gather(const mx::array& array, const std::optional<mx::array>& scales, const mx::array& block_tables,
                 const Row& row, int first, mx::Stream s) {
  auto tokens = gather_tokens(array, block_tables, row, first, s);
  if (scales) {
    tokens = mx::multiply(tokens, mx::expand_dims(gather_tokens(*scales, block_tables, row, first, s), -1, s), s);
  }
  return mx::expand_dims(mx::transpose(tokens, {1, 0, 2}, s), 1, s);
}

// Which of the keys [first, context_len) the row's queries see, as bool [queries, keys].
mx::array seen_keys(const Row& row, int first, std::optional<int> window, mx::Stream s) {
  const int end = row.context_len;
  const auto queries = mx::arange(end - (row.query_end - row.query_begin), end, mx::int32, s);
  const auto distance =
      mx::subtract(mx::expand_dims(queries, 1, s), mx::expand_dims(mx::arange(first, end, mx::int32, s), 0, s), s);
  const auto is_past = mx::greater_equal(distance, mx::array(0), s);
  return window ? mx::logical_and(is_past, mx::less(distance, mx::array(*window), s), s) : is_past;
}

// q [H, queries, D] -> [H, queries, D]
mx::array attend_row(const mx::array& q, const KVPool& pool, const mx::array& block_tables, const Row& row,
                     const AttentionOptions& options, mx::Stream s) {
  const int num_queries = row.query_end - row.query_begin, num_heads = pool.num_heads();
  // Keys [first, context_len) are seen; those before may lie in blocks that are no longer the row's.
  const int first = options.window ? std::max(0, row.context_len - num_queries + 1 - *options.window) : 0;
  const auto grouped = mx::reshape(q, {num_heads, -1, num_queries, pool.head_dim()}, s);  // [Hk, H / Hk, queries, D]
  const auto k = gather(pool.keys, pool.key_scales, block_tables, row, first, s);
  const auto v = gather(pool.values, pool.value_scales, block_tables, row, first, s);
  auto scores = mx::matmul(mx::multiply(grouped, mx::array(options.scale), s), mx::swapaxes(k, -1, -2, s), s);
  if (options.softcap) {
    const mx::array cap(*options.softcap);
    scores = mx::multiply(cap, mx::tanh(mx::divide(scores, cap, s), s), s);
  }
  scores = mx::where(seen_keys(row, first, options.window, s), scores, mx::array(-INFINITY), s);
  if (options.sinks) {
    const auto sinks = mx::reshape(mx::astype(*options.sinks, mx::float32, s), {num_heads, -1, 1, 1}, s);
    const mx::Shape column{num_heads, grouped.shape(1), num_queries, 1};
    scores = mx::concatenate({scores, mx::broadcast_to(sinks, column, s)}, -1, s);
  }
  auto weights = mx::softmax(scores, -1, /*precise=*/true, s);
  weights = mx::slice(weights, {0, 0, 0, 0}, {num_heads, grouped.shape(1), num_queries, row.context_len - first}, s);
  return mx::reshape(mx::matmul(weights, v, s), q.shape(), s);
}

}  // namespace

mx::array paged_attention_fallback(const mx::array& q, const KVPool& pool, const AttentionBatch& batch,
                                   const AttentionOptions& options, mx::StreamOrDevice s_) {
  const auto s = mx::to_stream(s_);
  const auto queries = mx::transpose(mx::astype(q, mx::float32, s), {1, 0, 2}, s);  // [H, T, D]
  std::vector<mx::array> outputs;
  int begin = 0;
  for (int b = 0; b < batch.num_rows(); ++b) {
    const Row row{b, begin, begin + batch.query_lens()[b], batch.context_lens()[b]};
    const auto row_q = mx::slice(queries, {0, row.query_begin, 0}, {q.shape(1), row.query_end, q.shape(2)}, s);
    outputs.push_back(attend_row(row_q, pool, batch.block_tables(), row, options, s));
    begin = row.query_end;
  }
  if (outputs.empty()) {
    return q;
  }
  return mx::astype(mx::transpose(mx::concatenate(outputs, 1, s), {1, 0, 2}, s), q.dtype(), s);
}

}  // namespace mlx_server
