// The gated delta rule on CPUs: plain pointers, no MLX. gated_delta.h says what is computed.
#pragma once

#include <cstdint>
#include <span>

#include "common/thread_pool.h"

namespace mlx_server {

struct GatedDelta {
  const float* qkv;                 // [T, C]
  const float* conv_weight;         // [C, K]
  const float *a, *b;               // [T, Hv]
  const float *a_log, *dt_bias;     // [Hv]
  float* conv_state;                // [S, K - 1, C], updated
  float* state;                     // [S, Hv, Dv, Dk], updated
  const std::int32_t* slots;        // [B]
  float* mixed;                     // [T * C] scratch: for each row, for each head of q, k and v, [query_len, D]
  float* y;                         // [T, Hv, Dv]
  std::span<const int> query_lens;  // [B]
  std::span<const char> fresh;      // [B]
  int taps, num_key_heads, num_value_heads;
  int key_dim, value_dim;   // multiples of 8
  bool one_by_one = false;  // no chunks of tokens, so that it does not matter how a prompt is cut

  int num_heads() const { return 2 * num_key_heads + num_value_heads; }  // of q, k and v
  int num_channels() const { return 2 * num_key_heads * key_dim + num_value_heads * value_dim; }
  // Channels before head `head` of q, k and v.
  int first_channel(int head) const {
    const int values = head - 2 * num_key_heads;
    return values < 0 ? head * key_dim : 2 * num_key_heads * key_dim + values * value_dim;
  }
};

// A row of the batch: what a thread computes at a time is one head of it.
struct GatedDeltaRow {
  int slot, first_token, num_tokens;
  bool fresh;
};

struct GatedDeltaKernel {
  const char* name;
  // Convolution and SiLU of one head of q, k or v, q and k at their final length, into mixed; moves the conv_state on.
  void (*convolve)(const GatedDelta& op, const GatedDeltaRow& row, int head);
  // The recurrence of one value head, from mixed into y and the state.
  void (*scan)(const GatedDelta& op, const GatedDeltaRow& row, int value_head);
};

// The kernels that this processor can run, best first.
std::span<const GatedDeltaKernel* const> gated_delta_kernels();

void gated_delta(const GatedDelta& op, ThreadPool& pool, const GatedDeltaKernel& kernel = *gated_delta_kernels()[0]);

extern const GatedDeltaKernel kGatedDeltaAvx2, kGatedDeltaPortable;

}  // namespace mlx_server
