#include "paged_attention/paged_attention.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/fast.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "common/op_error.h"
#include "common/row_contiguous.h"
#include "common/thread_pool.h"
#include "common/write_rows.h"
#include "paged_attention/paged_attention_cpu.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

void check_pools(const char* op, const mx::array& k_pool, const mx::array& v_pool) {
  if (k_pool.ndim() != 4 || k_pool.shape() != v_pool.shape() || k_pool.dtype() != v_pool.dtype()) {
    op_error(op, "k_pool and v_pool must have one shape [N, block_size, Hk, D] and one dtype but got ", k_pool.shape(),
             " ", k_pool.dtype(), " and ", v_pool.shape(), " ", v_pool.dtype());
  }
}

void check_write(const mx::array& k_pool, const mx::array& v_pool, const mx::array& k, const mx::array& v,
                 const mx::array& slot_mapping) {
  check_pools("write_kv", k_pool, v_pool);
  if (k.ndim() != 3 || k.shape(1) != k_pool.shape(2) || k.shape(2) != k_pool.shape(3) || k.shape() != v.shape()) {
    op_error("write_kv", "k and v must have the shape [T, ", k_pool.shape(2), ", ", k_pool.shape(3), "] but got ",
             k.shape(), " and ", v.shape());
  }
  if (slot_mapping.shape() != mx::Shape{k.shape(0)} || slot_mapping.dtype() != mx::int32) {
    op_error("write_kv", "slot_mapping must be int32 [", k.shape(0), "] but got ", slot_mapping.dtype(), " ",
             slot_mapping.shape());
  }
}

void check_attention(const mx::array& q, const mx::array& k_pool, const mx::array& v_pool,
                     const mx::array& block_tables, const std::vector<int>& query_lens,
                     const std::vector<int>& context_lens, std::optional<int> window) {
  const char* op = "paged_attention";
  check_pools(op, k_pool, v_pool);
  if (q.ndim() != 3 || q.shape(2) != k_pool.shape(3) || q.shape(1) % k_pool.shape(2) != 0) {
    op_error(op, "q must have the shape [T, H, ", k_pool.shape(3), "] with H a multiple of ", k_pool.shape(2),
             " but got ", q.shape());
  }
  if (block_tables.ndim() != 2 || block_tables.dtype() != mx::int32) {
    op_error(op, "block_tables must be int32 [B, M] but got ", block_tables.dtype(), " ", block_tables.shape());
  }
  const auto num_rows = static_cast<std::size_t>(block_tables.shape(0));
  if (query_lens.size() != num_rows || context_lens.size() != num_rows) {
    op_error(op, "query_lens and context_lens must have one entry for each of the ", num_rows,
             " rows of block_tables but got ", query_lens.size(), " and ", context_lens.size());
  }
  if (window.has_value() && *window < 1) {
    op_error(op, "window must be at least 1 but got ", *window);
  }
  const int max_context_len = block_tables.shape(1) * k_pool.shape(1);
  int num_tokens = 0;
  for (std::size_t b = 0; b < num_rows; ++b) {
    if (query_lens[b] < 1 || query_lens[b] > context_lens[b] || context_lens[b] > max_context_len) {
      op_error(op, "rows need 1 <= query_len <= context_len <= ", max_context_len, " but row ", b, " got query_len ",
               query_lens[b], " and context_len ", context_lens[b]);
    }
    num_tokens += query_lens[b];
  }
  if (q.shape(0) != num_tokens) {
    op_error(op, "query_lens must add up to q's ", q.shape(0), " tokens but got ", num_tokens);
  }
}

// pool [N, block_size, Hk, D], slots [T], tokens [T, Hk, D]
mx::array write_pool(const mx::array& pool, const mx::array& slots, const mx::array& tokens, mx::Stream s) {
  const mx::Shape flat{pool.shape(0) * pool.shape(1), pool.shape(2), pool.shape(3)};
  const auto written = write_rows(mx::reshape(pool, flat, s), slots, mx::astype(tokens, pool.dtype(), s), s);
  return mx::reshape(written, pool.shape(), s);
}

// Tokens [first, end) of the blocks, as [1, Hk, end - first, D].
mx::array gather_tokens(const mx::array& pool, const mx::array& blocks, int first, int end, mx::Stream s) {
  const int num_heads = pool.shape(2), head_dim = pool.shape(3);
  auto tokens = mx::reshape(mx::take(pool, blocks, 0, s), {1, -1, num_heads, head_dim}, s);
  tokens = mx::slice(tokens, {0, first, 0, 0}, {1, end, num_heads, head_dim}, s);
  return mx::transpose(tokens, {0, 2, 1, 3}, s);
}

// Which of the keys [first, end) the last query_len positions before end see, as bool [query_len, end - first].
mx::array window_mask(int first, int end, int query_len, int window, mx::Stream s) {
  const auto queries = mx::expand_dims(mx::arange(end - query_len, end, mx::int32, s), 1, s);
  const auto keys = mx::expand_dims(mx::arange(first, end, mx::int32, s), 0, s);
  const auto distance = mx::subtract(queries, keys, s);
  return mx::logical_and(mx::greater_equal(distance, mx::array(0), s), mx::less(distance, mx::array(window), s), s);
}

// q [T, H, D], k_pool, v_pool [N, block_size, Hk, D], all float32, block_tables [B, M]  ->  [T, H, D]
class PagedAttentionPrimitive : public mx::UnaryPrimitive {
 public:
  PagedAttentionPrimitive(mx::Stream stream, std::vector<int> query_lens, std::vector<int> context_lens, float scale,
                          int window)
      : UnaryPrimitive(stream),
        query_lens_(std::move(query_lens)),
        context_lens_(std::move(context_lens)),
        scale_(scale),
        window_(window) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    const mx::array q = row_contiguous(inputs[0], stream()), k_pool = row_contiguous(inputs[1], stream());
    const mx::array v_pool = row_contiguous(inputs[2], stream()), tables = row_contiguous(inputs[3], stream());
    out.set_data(mx::allocator::malloc(out.nbytes()));
    PagedAttention op{.q = q.data<float>(),
                      .k_pool = k_pool.data<float>(),
                      .v_pool = v_pool.data<float>(),
                      .block_tables = tables.data<std::int32_t>(),
                      .out = out.data<float>(),
                      .query_lens = {},
                      .context_lens = {},
                      .max_blocks = tables.shape(1),
                      .block_size = k_pool.shape(1),
                      .num_heads = q.shape(1),
                      .num_kv_heads = k_pool.shape(2),
                      .head_dim = q.shape(2),
                      .window = window_,
                      .scale = scale_};
    mx::cpu::get_command_encoder(stream()).dispatch(
        [op, query_lens = query_lens_, context_lens = context_lens_]() mutable {
          op.query_lens = query_lens;
          op.context_lens = context_lens;
          paged_attention(op, ThreadPool::shared());
        });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    op_error("paged_attention", "the primitive must run on a CPU stream but got a GPU stream");
  }

  bool is_equivalent(const mx::Primitive& other) const override {
    const auto& o = static_cast<const PagedAttentionPrimitive&>(other);
    return query_lens_ == o.query_lens_ && context_lens_ == o.context_lens_ && scale_ == o.scale_ &&
           window_ == o.window_;
  }

  DEFINE_NAME(PagedAttention)

 private:
  std::vector<int> query_lens_, context_lens_;
  float scale_;
  int window_;
};

}  // namespace

std::pair<mx::array, mx::array> write_kv(const mx::array& k_pool, const mx::array& v_pool, const mx::array& k,
                                         const mx::array& v, const mx::array& slot_mapping, mx::StreamOrDevice s_) {
  check_write(k_pool, v_pool, k, v, slot_mapping);
  const auto s = mx::to_stream(s_);
  return {write_pool(k_pool, slot_mapping, k, s), write_pool(v_pool, slot_mapping, v, s)};
}

mx::array paged_attention(const mx::array& q, const mx::array& k_pool, const mx::array& v_pool,
                          const mx::array& block_tables, const std::vector<int>& query_lens,
                          const std::vector<int>& context_lens, float scale, std::optional<int> window,
                          mx::StreamOrDevice s_) {
  check_attention(q, k_pool, v_pool, block_tables, query_lens, context_lens, window);
  const auto s = mx::to_stream(s_);
  const bool has_kernel =
      s.device == mx::Device::cpu && q.dtype() == mx::float32 && k_pool.dtype() == mx::float32 && q.shape(2) % 8 == 0;
  if (!has_kernel) {
    return paged_attention_fallback(q, k_pool, v_pool, block_tables, query_lens, context_lens, scale, window, s);
  }
  const int num_seen = window.value_or(std::numeric_limits<int>::max());
  return mx::array(q.shape(), q.dtype(),
                   std::make_shared<PagedAttentionPrimitive>(s, query_lens, context_lens, scale, num_seen),
                   {q, k_pool, v_pool, block_tables});
}

mx::array paged_attention_fallback(const mx::array& q, const mx::array& k_pool, const mx::array& v_pool,
                                   const mx::array& block_tables, const std::vector<int>& query_lens,
                                   const std::vector<int>& context_lens, float scale, std::optional<int> window,
                                   mx::StreamOrDevice s_) {
  check_attention(q, k_pool, v_pool, block_tables, query_lens, context_lens, window);
  const auto s = mx::to_stream(s_);
  const int block_size = k_pool.shape(1), num_heads = q.shape(1), head_dim = q.shape(2);
  std::vector<mx::array> outputs;
  int begin = 0;
  for (int b = 0; b < block_tables.shape(0); ++b) {
    const int end = begin + query_lens[b];
    const int num_blocks = (context_lens[b] + block_size - 1) / block_size;
    // Keys [first, context_len) are seen; those before may lie in blocks that are no longer the row's.
    const int first = window ? std::max(0, context_lens[b] - query_lens[b] + 1 - *window) : 0;
    const int first_block = first / block_size, skipped = first_block * block_size;
    const auto blocks = mx::flatten(mx::slice(block_tables, {b, first_block}, {b + 1, num_blocks}, s), s);
    const auto k = gather_tokens(k_pool, blocks, first - skipped, context_lens[b] - skipped, s);
    const auto v = gather_tokens(v_pool, blocks, first - skipped, context_lens[b] - skipped, s);
    auto row = mx::expand_dims(mx::slice(q, {begin, 0, 0}, {end, num_heads, head_dim}, s), 0, s);
    row = mx::transpose(row, {0, 2, 1, 3}, s);  // [1, H, query_len, D]
    // One query sees all these keys: without a mask MLX has a far faster kernel.
    const bool one = query_lens[b] == 1, windowed = !one && window && *window < context_lens[b];
    std::optional<mx::array> mask;
    if (windowed) {
      mask = window_mask(first, context_lens[b], query_lens[b], *window, s);
    }
    const char* mask_mode = one ? "" : windowed ? "array" : "causal";
    const auto out = mx::fast::scaled_dot_product_attention(row, k, v, scale, mask_mode, mask, {}, false, s);
    outputs.push_back(mx::squeeze(mx::transpose(out, {0, 2, 1, 3}, s), 0, s));  // [query_len, H, D]
    begin = end;
  }
  return outputs.empty() ? q : mx::concatenate(outputs, 0, s);
}

}  // namespace mlx_server
