// Attention over a paged KV cache on CPUs: plain pointers, no MLX. paged_attention.h says what is computed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "common/thread_pool.h"

namespace mlx_server {

// Keys or values of the pool: floats, or integers to be multiplied by a scale.
struct CachedRows {
  const float* floats = nullptr;          // [N, block_size, Hk, D], or null
  const std::int8_t* integers = nullptr;  // likewise
  const float* scales = nullptr;          // [N, block_size, Hk] of integers
};

struct PagedAttention {
  const float* q;  // [T, H, D]
  CachedRows keys, values;
  const std::int32_t* block_tables;   // [B, max_blocks]
  const float* sinks;                 // [H], or null
  float* out;                         // [T, H, D]
  std::span<const int> query_lens;    // [B]
  std::span<const int> context_lens;  // [B]
  int max_blocks, block_size, num_heads, num_kv_heads;
  int head_dim;  // a multiple of 8
  int window;    // tokens that a query sees, its own included
  float scale;
  float softcap;  // 0 for none
};

// Some queries of one row, all heads that share one of some key/value heads.
struct AttentionTile {
  int row;
  int first_kv_head, num_kv_heads;
  int first_token;  // of q and out
  int first_pos;    // of the first query in its row
  int num_queries;
};

// A query's softmax over the keys that it has seen: weights are relative to exp(max).
struct OnlineSoftmax {
  float max, sum;
};

// Attention of a tile over some of the keys, [tile's key/value heads, num_queries, H / Hk] heads.
struct AttentionPart {
  OnlineSoftmax* softmax;  // [heads]; {-infinity, 0} where no key is seen
  float* acc;              // [heads, D], sums of values by weight
};

constexpr int kSplitSize = 256;  // keys

// Keys that are taken at a time, so that they stay in the L1 cache, beside their values.
constexpr int kMaxChunkSize = 64;
constexpr int attention_chunk_size(int head_dim) { return std::clamp(4096 / head_dim / 8 * 8, 8, kMaxChunkSize); }

// Floats for the scaled queries, and for a chunk of keys and values made from integers.
constexpr std::size_t attention_scratch_size(std::size_t num_heads, std::size_t head_dim) {
  return (num_heads + 2 * kMaxChunkSize) * head_dim;
}

struct AttentionKernel {
  const char* name;
  // The tile's attention over the keys [split * kSplitSize, (split + 1) * kSplitSize), without sinks.
  // scratch: attention_scratch_size(heads, D).
  void (*attend)(const PagedAttention& op, const AttentionTile& tile, int split, float* scratch,
                 const AttentionPart& part);
};

// The kernels that this processor can run, best first.
std::span<const AttentionKernel* const> attention_kernels();

void paged_attention(const PagedAttention& op, ThreadPool& pool,
                     const AttentionKernel& kernel = *attention_kernels()[0]);

// Rows of x [num_rows, head_dim] as integers and scales, see kv_quantize.kernel.
void quantize_rows(const float* x, std::size_t num_rows, std::size_t head_dim, std::int8_t* integers, float* scales);

extern const AttentionKernel kAttentionAvx512, kAttentionAvx2, kAttentionPortable;

}  // namespace mlx_server
