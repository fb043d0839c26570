#include <algorithm>
#include <bit>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <mlx/ops.h>

#include "kernel_sources.h"
#include "kernels/kernel_use.h"
#include "kernels/launch.h"
#include "paged_attention/paged_attention.h"

namespace mlx_server {

namespace mx = mlx::core;

namespace {

using Constants = std::vector<std::pair<std::string, mx::fast::TemplateArg>>;

constexpr int kThreads = 128;

// One call of the op: what its kernels share.
struct Call {
  const mx::array& q;
  const KVPool& pool;
  const AttentionBatch& batch;
  const AttentionOptions& options;
  mx::Stream stream;

  int num_heads() const { return q.shape(1); }
  int head_dim() const { return q.shape(2); }
  int sharing() const { return num_heads() / pool.num_heads(); }  // heads that share a key/value head
  // Where there are none, an array that is not read.
  const mx::array& sinks() const { return options.sinks ? *options.sinks : q; }
  const mx::array& key_scales() const { return pool.key_scales ? *pool.key_scales : q; }
  const mx::array& value_scales() const { return pool.value_scales ? *pool.value_scales : q; }

  Constants constants(int heads) const {
    return {{"T", q.dtype()},
            {"KV", pool.keys.dtype()},
            {"HAS_SCALES", pool.key_scales ? 1 : 0},
            {"HEAD_DIM", head_dim()},
            {"KV_HEADS", pool.num_heads()},
            {"SHARING", sharing()},
            {"HEADS", heads},
            {"BLOCK_SIZE", pool.block_size()},
            {"SCALE_BITS", std::bit_cast<int>(options.scale)},
            {"SOFTCAP_BITS", std::bit_cast<int>(options.softcap.value_or(0.0f))}};
  }

  int head_groups(int heads) const { return pool.num_heads() * ((sharing() + heads - 1) / heads); }
};

// Queries one by one: [Q, H, D].
mx::array decode(const Call& call, const DecodeTables& tables) {
  const int heads = std::min(static_cast<int>(std::bit_ceil(static_cast<unsigned>(call.sharing()))), 8);
  const int num_splits = tables.splits.shape(0), num_queries = tables.queries.shape(0);
  const int num_heads = call.num_heads(), head_dim = call.head_dim();
  Constants constants = call.constants(heads);
  constants.emplace_back("SPLIT", kAttentionSplit);
  const auto splits = launch(kernel_sources::attention_decode,
                             {.inputs = {call.q, call.pool.keys, call.pool.values, call.key_scales(),
                                         call.value_scales(), call.batch.block_tables(), tables.splits},
                              .output_shapes = {{num_splits, num_heads, head_dim}, {num_splits, num_heads, 2}},
                              .output_dtypes = {mx::float32, mx::float32},
                              .constants = std::move(constants),
                              .groups = {num_splits, call.head_groups(heads), 1},
                              .threads = kThreads},
                             call.stream);
  return launch(kernel_sources::attention_combine,
                {.inputs = {splits[0], splits[1], tables.queries, call.sinks()},
                 .output_shapes = {{num_queries, num_heads, head_dim}},
                 .output_dtypes = {call.q.dtype()},
                 .constants = {{"T", call.q.dtype()},
                               {"HEAD_DIM", head_dim},
                               {"NUM_HEADS", num_heads},
                               {"HAS_SINKS", call.options.sinks.has_value() ? 1 : 0}},
                 .groups = {num_heads, num_queries, 1},
                 .threads = 64},
                call.stream)[0];
}

// How attention of many queries is computed.
struct Prefill {
  const KernelSource& kernel;
  bool is_enabled;
  int heads;         // of a group
  int tile_queries;  // of a group
};

Prefill choose_prefill(const Call& call) {
  constexpr std::string_view kMatrix = "attention_matrix", kPlain = "attention_prefill";
  const int heads = std::min(call.sharing(), 16);
  const bool fits_matrix =
      call.q.dtype().size() == 2 && call.head_dim() % 16 == 0 && call.head_dim() <= 128 && has_matrix_units();
  const std::string_view best = first_enabled({fits_matrix ? kMatrix : kPlain, kPlain});
  return best == kMatrix ? Prefill{kernel_sources::attention_matrix, true, heads, kThreads / 2 / heads}
                         : Prefill{kernel_sources::attention_prefill, best == kPlain, heads, kThreads / 4 / heads};
}

// The other rows: [their tokens, H, D].
mx::array prefill(const Call& call, const AttentionTables& tables, const Prefill& choice) {
  Constants constants = call.constants(choice.heads);
  constants.emplace_back("HAS_SINKS", call.options.sinks.has_value() ? 1 : 0);
  return launch(choice.kernel,
                {.inputs = {call.q, call.pool.keys, call.pool.values, call.key_scales(), call.value_scales(),
                            call.batch.block_tables(), *tables.tiles, call.sinks()},
                 .output_shapes = {{tables.num_prefill_tokens, call.num_heads(), call.head_dim()}},
                 .output_dtypes = {call.q.dtype()},
                 .constants = std::move(constants),
                 .groups = {tables.tiles->shape(0), call.head_groups(choice.heads), 1},
                 .threads = kThreads},
                call.stream)[0];
}

}  // namespace

mx::array paged_attention_gpu(const mx::array& q, const KVPool& pool, const AttentionBatch& batch,
                              const AttentionOptions& options, mx::Stream s) {
  const Call call{q, pool, batch, options, s};
  const Prefill choice = choose_prefill(call);
  const AttentionTables& tables =
      batch.tables(options.window.value_or(std::numeric_limits<int>::max()), choice.tile_queries);
  const bool can_decode = tables.decodes.empty() || are_enabled({"attention_decode", "attention_combine"});
  const bool can_prefill = !tables.tiles || choice.is_enabled;
  if (!can_decode || !can_prefill) {
    return paged_attention_fallback(q, pool, batch, options, s);
  }
  std::vector<mx::array> outputs;
  for (const DecodeTables& part : tables.decodes) {
    outputs.push_back(decode(call, part));
  }
  if (tables.tiles) {
    outputs.push_back(prefill(call, tables, choice));
  }
  const mx::array out = outputs.size() == 1 ? outputs[0] : mx::concatenate(outputs, 0, s);
  return tables.order ? mx::take(out, *tables.order, 0, s) : out;
}

}  // namespace mlx_server
