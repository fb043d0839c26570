#include "paged_attention/paged_attention.h"

#include <sstream>
#include <stdexcept>
#include <string>

#include <mlx/fast.h>
#include <mlx/ops.h>

namespace mlx_server {

namespace mx = mlx::core;

namespace {

template <typename... Args>
[[noreturn]] void fail(const char* op, const Args&... args) {
  std::ostringstream message;
  message << "[" << op << "] ";
  (message << ... << args);
  message << ".";
  throw std::invalid_argument(message.str());
}

void check_pools(const char* op, const mx::array& k_pool, const mx::array& v_pool) {
  if (k_pool.ndim() != 4 || k_pool.shape() != v_pool.shape() || k_pool.dtype() != v_pool.dtype()) {
    fail(op, "k_pool and v_pool must have one shape [N, block_size, Hk, D] and one dtype but got ", k_pool.shape(), " ",
         k_pool.dtype(), " and ", v_pool.shape(), " ", v_pool.dtype());
  }
}

void check_write(const mx::array& k_pool, const mx::array& v_pool, const mx::array& k, const mx::array& v,
                 const mx::array& slot_mapping) {
  check_pools("write_kv", k_pool, v_pool);
  if (k.ndim() != 3 || k.shape(1) != k_pool.shape(2) || k.shape(2) != k_pool.shape(3) || k.shape() != v.shape()) {
    fail("write_kv", "k and v must have the shape [T, ", k_pool.shape(2), ", ", k_pool.shape(3), "] but got ",
         k.shape(), " and ", v.shape());
  }
  if (slot_mapping.shape() != mx::Shape{k.shape(0)} || slot_mapping.dtype() != mx::int32) {
    fail("write_kv", "slot_mapping must be int32 [", k.shape(0), "] but got ", slot_mapping.dtype(), " ",
         slot_mapping.shape());
  }
}

void check_attention(const mx::array& q, const mx::array& k_pool, const mx::array& v_pool,
                     const mx::array& block_tables, const std::vector<int>& query_lens,
                     const std::vector<int>& context_lens) {
  const char* op = "paged_attention";
  check_pools(op, k_pool, v_pool);
  if (q.ndim() != 3 || q.shape(2) != k_pool.shape(3) || q.shape(1) % k_pool.shape(2) != 0) {
    fail(op, "q must have the shape [T, H, ", k_pool.shape(3), "] with H a multiple of ", k_pool.shape(2), " but got ",
         q.shape());
  }
  if (block_tables.ndim() != 2 || block_tables.dtype() != mx::int32) {
    fail(op, "block_tables must be int32 [B, M] but got ", block_tables.dtype(), " ", block_tables.shape());
  }
  const auto num_rows = static_cast<std::size_t>(block_tables.shape(0));
  if (query_lens.size() != num_rows || context_lens.size() != num_rows) {
    fail(op, "query_lens and context_lens must have one entry for each of the ", num_rows,
         " rows of block_tables but got ", query_lens.size(), " and ", context_lens.size());
  }
  const int max_context_len = block_tables.shape(1) * k_pool.shape(1);
  int num_tokens = 0;
  for (std::size_t b = 0; b < num_rows; ++b) {
    if (query_lens[b] < 1 || query_lens[b] > context_lens[b] || context_lens[b] > max_context_len) {
      fail(op, "rows need 1 <= query_len <= context_len <= ", max_context_len, " but row ", b, " got query_len ",
           query_lens[b], " and context_len ", context_lens[b]);
    }
    num_tokens += query_lens[b];
  }
  if (q.shape(0) != num_tokens) {
    fail(op, "query_lens must add up to q's ", q.shape(0), " tokens but got ", num_tokens);
  }
}

// pool [N, block_size, Hk, D], slots [T], tokens [T, Hk, D]
mx::array write_pool(const mx::array& pool, const mx::array& slots, const mx::array& tokens, mx::Stream s) {
  const mx::Shape flat{pool.shape(0) * pool.shape(1), pool.shape(2), pool.shape(3)};
  const auto updates = mx::expand_dims(mx::astype(tokens, pool.dtype(), s), 1, s);  // [T, 1, Hk, D]
  return mx::reshape(mx::scatter(mx::reshape(pool, flat, s), slots, updates, 0, s), pool.shape(), s);
}

// The first num_tokens tokens of the blocks, as [1, Hk, num_tokens, D].
mx::array gather_tokens(const mx::array& pool, const mx::array& blocks, int num_tokens, mx::Stream s) {
  const int num_heads = pool.shape(2), head_dim = pool.shape(3);
  auto tokens = mx::reshape(mx::take(pool, blocks, 0, s), {1, -1, num_heads, head_dim}, s);
  tokens = mx::slice(tokens, {0, 0, 0, 0}, {1, num_tokens, num_heads, head_dim}, s);
  return mx::transpose(tokens, {0, 2, 1, 3}, s);
}

// The specification of `paged_attention`, and what runs where there is no kernel.
mx::array paged_attention_fallback(const mx::array& q, const mx::array& k_pool, const mx::array& v_pool,
                                   const mx::array& block_tables, const std::vector<int>& query_lens,
                                   const std::vector<int>& context_lens, float scale, mx::Stream s) {
  const int block_size = k_pool.shape(1), num_heads = q.shape(1), head_dim = q.shape(2);
  std::vector<mx::array> outputs;
  int begin = 0;
  for (int b = 0; b < block_tables.shape(0); ++b) {
    const int end = begin + query_lens[b];
    const int num_blocks = (context_lens[b] + block_size - 1) / block_size;
    const auto blocks = mx::flatten(mx::slice(block_tables, {b, 0}, {b + 1, num_blocks}, s), s);  // [num_blocks]
    const auto k = gather_tokens(k_pool, blocks, context_lens[b], s);
    const auto v = gather_tokens(v_pool, blocks, context_lens[b], s);
    auto row = mx::expand_dims(mx::slice(q, {begin, 0, 0}, {end, num_heads, head_dim}, s), 0, s);
    row = mx::transpose(row, {0, 2, 1, 3}, s);  // [1, H, query_len, D]
    // One query sees its whole context: without a mask MLX has a far faster kernel.
    const char* mask = query_lens[b] == 1 ? "" : "causal";
    const auto out = mx::fast::scaled_dot_product_attention(row, k, v, scale, mask, {}, {}, false, s);
    outputs.push_back(mx::squeeze(mx::transpose(out, {0, 2, 1, 3}, s), 0, s));  // [query_len, H, D]
    begin = end;
  }
  return outputs.size() == 1 ? outputs[0] : mx::concatenate(outputs, 0, s);
}

}  // namespace

std::pair<mx::array, mx::array> write_kv(const mx::array& k_pool, const mx::array& v_pool, const mx::array& k,
                                         const mx::array& v, const mx::array& slot_mapping, mx::StreamOrDevice s_) {
  check_write(k_pool, v_pool, k, v, slot_mapping);
  const auto s = mx::to_stream(s_);
  return {write_pool(k_pool, slot_mapping, k, s), write_pool(v_pool, slot_mapping, v, s)};
}

mx::array paged_attention(const mx::array& q, const mx::array& k_pool, const mx::array& v_pool,
                          const mx::array& block_tables, const std::vector<int>& query_lens,
                          const std::vector<int>& context_lens, float scale, mx::StreamOrDevice s_) {
  check_attention(q, k_pool, v_pool, block_tables, query_lens, context_lens);
  const auto s = mx::to_stream(s_);
  if (query_lens.empty()) {
    return mx::zeros_like(q, s);
  }
  return paged_attention_fallback(q, k_pool, v_pool, block_tables, query_lens, context_lens, scale, s);
}

}  // namespace mlx_server
