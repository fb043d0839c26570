#include "paged_attention/paged_attention_cpu.h"

#include <algorithm>
#include <vector>

#include "common/cpu_info.h"

namespace mlx_server {

namespace {

// Query heads in a tile: enough to use a chunk of keys many times while it is in the L1 cache.
constexpr int kTileHeads = 32;

std::vector<AttentionTile> make_tiles(const PagedAttention& op) {
  const int tile_queries = std::max(1, kTileHeads * op.num_kv_heads / op.num_heads);
  std::vector<AttentionTile> tiles;
  int token = 0;
  for (int row = 0; row < static_cast<int>(op.query_lens.size()); ++row) {
    const int query_len = op.query_lens[row], first_pos = op.context_lens[row] - query_len;
    // The last queries see most keys: longest tiles first.
    for (int end = query_len; end > 0; end -= tile_queries) {
      const int begin = std::max(0, end - tile_queries);
      for (int kv_head = 0; kv_head < op.num_kv_heads; ++kv_head) {
        tiles.push_back({row, kv_head, token + begin, first_pos + begin, end - begin});
      }
    }
    token += query_len;
  }
  return tiles;
}

}  // namespace

std::span<const AttentionKernel* const> attention_kernels() {
#if defined(__x86_64__)
  static const AttentionKernel* const all[] = {&kAttentionAvx2, &kAttentionPortable};
  return std::span(all).subspan(cpu_has_avx2() ? 0 : 1);
#else
  static const AttentionKernel* const all[] = {&kAttentionPortable};
  return all;
#endif
}

void paged_attention(const PagedAttention& op, ThreadPool& pool, const AttentionKernel& kernel) {
  const std::vector<AttentionTile> tiles = make_tiles(op);
  const int group = op.num_heads / op.num_kv_heads;
  pool.parallel_for(static_cast<int>(tiles.size()), [&](int i) {
    thread_local std::vector<float> q;
    thread_local std::vector<OnlineSoftmax> softmax;
    const auto num_heads = static_cast<std::size_t>(tiles[i].num_queries * group);
    q.resize(std::max(q.size(), num_heads * op.head_dim));
    softmax.resize(std::max(softmax.size(), num_heads));
    kernel.attend(op, tiles[i], q.data(), softmax.data());
  });
}

}  // namespace mlx_server
