#include "paged_attention/paged_attention.h"

#include <limits>
#include <memory>
#include <utility>

#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>
#include <mlx/primitives.h>

#include "common/op_error.h"
#include "common/row_contiguous.h"
#include "common/thread_pool.h"
#include "kernels/launch.h"
#include "paged_attention/paged_attention_cpu.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

void check_options(const char* op, const AttentionOptions& options, int num_heads) {
  if (!(options.scale >= 0)) {
    op_error(op, "scale must be at least 0 but got ", options.scale);
  }
  if (options.window.has_value() && *options.window < 1) {
    op_error(op, "window must be at least 1 but got ", *options.window);
  }
  if (options.softcap.has_value() && !(*options.softcap > 0)) {
    op_error(op, "softcap must be greater than 0 but got ", *options.softcap);
  }
  if (options.sinks && options.sinks->shape() != mx::Shape{num_heads}) {
    op_error(op, "sinks must have the shape [", num_heads, "] but got ", options.sinks->shape());
  }
}

void check(const mx::array& q, const KVPool& pool, const AttentionBatch& batch, const AttentionOptions& options) {
  constexpr char op[] = "paged_attention";
  check_kv_pool(op, pool);
  if (q.ndim() != 3 || q.shape(2) != pool.head_dim() || q.shape(1) % pool.num_heads() != 0) {
    op_error(op, "q must have the shape [T, H, ", pool.head_dim(), "] with H a multiple of ", pool.num_heads(),
             " but got ", q.shape());
  }
  if (q.shape(0) != batch.num_tokens()) {
    op_error(op, "the batch's query_lens must add up to q's ", q.shape(0), " tokens but got ", batch.num_tokens());
  }
  const int max_context_len = batch.block_tables().shape(1) * pool.block_size();
  for (int b = 0; b < batch.num_rows(); ++b) {
    if (batch.context_lens()[b] > max_context_len) {
      op_error(op, "context_lens must be at most M * block_size = ", max_context_len, " but row ", b, " got ",
               batch.context_lens()[b]);
    }
  }
  check_options(op, options, q.shape(1));
}

// inputs: q [T, H, D], the batch's block_tables, keys and values [N, block_size, Hk, D], their scales if they are
// integers, sinks [H] if there are any
class PagedAttentionPrimitive : public mx::UnaryPrimitive {
 public:
  PagedAttentionPrimitive(mx::Stream stream, const AttentionBatch& batch, const AttentionOptions& options)
      : UnaryPrimitive(stream), batch_(batch), options_(options) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    std::vector<mx::array> arrays;
    for (const mx::array& input : inputs) {
      arrays.push_back(row_contiguous(input, stream()));
    }
    const mx::array &q = arrays[0], &tables = arrays[1], &keys = arrays[2];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    PagedAttention op{.q = q.data<float>(),
                      .keys = cached_rows(arrays, 2),
                      .values = cached_rows(arrays, 3),
                      .block_tables = tables.data<std::int32_t>(),
                      .sinks = options_.sinks ? arrays.back().data<float>() : nullptr,
                      .out = out.data<float>(),
                      .query_lens = {},
                      .context_lens = {},
                      .max_blocks = tables.shape(1),
                      .block_size = keys.shape(1),
                      .num_heads = q.shape(1),
                      .num_kv_heads = keys.shape(2),
                      .head_dim = q.shape(2),
                      .window = options_.window.value_or(std::numeric_limits<int>::max()),
                      .scale = options_.scale,
                      .softcap = options_.softcap.value_or(0.0f)};
    mx::cpu::get_command_encoder(stream()).dispatch(
        [op, query_lens = batch_.query_lens(), context_lens = batch_.context_lens()]() mutable {
          op.query_lens = query_lens;
          op.context_lens = context_lens;
          paged_attention(op, ThreadPool::shared());
        });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    op_error("paged_attention", "the primitive must run on a CPU stream but got a GPU stream");
  }

  DEFINE_NAME(PagedAttention)

 private:
  // Keys, at index 2, or values, at 3; their scales lie 2 further.
  static CachedRows cached_rows(const std::vector<mx::array>& arrays, std::size_t index) {
    const mx::array& rows = arrays[index];
    if (rows.dtype() == mx::float32) {
      return {.floats = rows.data<float>()};
    }
    return {.integers = rows.data<std::int8_t>(), .scales = arrays[index + 2].data<float>()};
  }

  AttentionBatch batch_;
  AttentionOptions options_;
};

mx::array paged_attention_cpu(const mx::array& q, const KVPool& pool, const AttentionBatch& batch,
                              const AttentionOptions& options, mx::Stream s) {
  std::vector<mx::array> inputs{q, batch.block_tables(), pool.keys, pool.values};
  if (pool.key_scales) {
    inputs.insert(inputs.end(), {*pool.key_scales, *pool.value_scales});
  }
  if (options.sinks) {
    inputs.push_back(mx::astype(*options.sinks, mx::float32, s));
  }
  return mx::array(q.shape(), q.dtype(), std::make_shared<PagedAttentionPrimitive>(s, batch, options),
                   std::move(inputs));
}

}  // namespace

mx::array paged_attention(const mx::array& q, const KVPool& pool, const AttentionBatch& batch,
                          const AttentionOptions& options, mx::StreamOrDevice s_) {
  check(q, pool, batch, options);
  const auto s = mx::to_stream(s_);
  const int head_dim = q.shape(2);
  if (batch.num_rows() == 0) {
    return q;
  }
  if (is_gpu(s) && head_dim >= 8 && head_dim <= 256) {
    return paged_attention_gpu(q, pool, batch, options, s);
  }
  const bool is_float = q.dtype() == mx::float32 && (pool.key_scales || pool.keys.dtype() == mx::float32);
  if (s.device == mx::Device::cpu && is_float && head_dim % 8 == 0) {
    return paged_attention_cpu(q, pool, batch, options, s);
  }
  return paged_attention_fallback(q, pool, batch, options, s);
}

}  // namespace mlx_server
