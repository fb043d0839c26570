// Mixture of experts for CPUs: plain pointers, no MLX. A token's result is the same to the last bit whatever the other
// tokens: its experts are added up in the order of their ids.
#pragma once

#include <cstdint>

#include "common/thread_pool.h"
#include "elementwise/elementwise_cpu.h"
#include "linear/linear_cpu.h"

namespace mlx_server {

struct Route {
  const float* logits;    // [tokens, num_experts]
  std::int32_t* experts;  // [tokens, top_k]
  float* weights;         // [tokens, top_k]
  std::int64_t tokens, num_experts, top_k;
  bool softmax;    // else sigmoid
  bool normalize;  // weights of a token sum to 1
};

void route(const Route& op, ThreadPool& pool);

struct MoeMlp {
  const float* x;               // [tokens, d]
  const std::int32_t* experts;  // [tokens, top_k], each in [0, num_experts)
  const float* weights;         // [tokens, top_k]
  LinearWeights gate, up;       // of all experts, one after the other: n = num_experts * hidden features, k = d
  LinearWeights down;           // n = num_experts * d, k = hidden features
  const float* shared;          // [tokens, d] or null
  float* hidden;                // [tokens * top_k, hidden features], scratch memory
  float* y;                     // [tokens, d]
  std::int64_t tokens, top_k, num_experts;

  std::int64_t d() const { return gate.k; }
  std::int64_t hidden_features() const { return down.k; }
};

void moe_mlp(const MoeMlp& op, ThreadPool& pool, const LinearKernels& linear = *linear_kernels()[0],
             const ElementwiseKernels& elementwise = *elementwise_kernels()[0]);

}  // namespace mlx_server
