// Attention over a paged KV cache on CPUs: plain pointers, no MLX. paged_attention.h says what is computed.
#pragma once

#include <cstdint>
#include <span>

#include "common/thread_pool.h"

namespace mlx_server {

struct PagedAttention {
  const float* q;                     // [T, H, D]
  const float* k_pool;                // [N, block_size, Hk, D]
  const float* v_pool;                // [N, block_size, Hk, D]
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

// Some queries of one row, all heads that share one key/value head: what a thread computes at a time.
struct AttentionTile {
  int row, kv_head;
  int first_token;  // of q and out
  int first_pos;    // of the first query in its row
  int num_queries;
};

// A query's softmax over the keys that it has seen: weights are relative to exp(max).
struct OnlineSoftmax {
  float max, sum;
};

struct AttentionKernel {
  const char* name;
  // Scratch memory: q [num_queries * H / Hk, D], softmax [num_queries * H / Hk].
  void (*attend)(const PagedAttention& op, const AttentionTile& tile, float* q, OnlineSoftmax* softmax);
};

// The kernels that this processor can run, best first.
std::span<const AttentionKernel* const> attention_kernels();

void paged_attention(const PagedAttention& op, ThreadPool& pool,
                     const AttentionKernel& kernel = *attention_kernels()[0]);

extern const AttentionKernel kAttentionAvx2, kAttentionPortable;

}  // namespace mlx_server
