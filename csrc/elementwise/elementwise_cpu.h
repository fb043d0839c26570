// The small ops between matrix products, for CPUs: plain pointers, no MLX. Each row's result is the same to the last
// bit whatever stands beside it. Arrays are float32.
#pragma once

#include <cstdint>
#include <span>

#include "common/thread_pool.h"

namespace mlx_server {

struct RmsNorm {
  const float* x;       // [rows, d]
  const float* weight;  // [d]
  float* y;             // [rows, d]
  std::int64_t rows, d;
  float eps;
};

struct GatedMul {
  const float *gate, *up;  // [rows, size], rows `stride` apart
  float* y;                // [rows, size]
  std::int64_t rows, size, stride;
};

// Queries, keys and values of one product: the first two normalised if there are norms, and turned by their positions.
struct QkvRope {
  const float* x;                 // [tokens, (heads * (gated ? 2 : 1) + 2 * kv_heads) * d], tokens token_stride apart
  const std::int32_t* positions;  // [tokens]
  const float* freqs;             // [half]
  const float* norms;             // [2, d], of queries and keys, or null
  float *q, *k, *v;               // [tokens, heads, d], [tokens, kv_heads, d]
  std::int64_t tokens, token_stride, heads, kv_heads, d, half;
  float eps, length_factor;
  bool gated;
};

// One instruction set's kernels.
struct ElementwiseKernels {
  const char* name;
  void (*rms_norm)(const RmsNorm& op);
  void (*silu_mul)(const GatedMul& op);
  void (*gelu_mul)(const GatedMul& op);
  // Of one token. cosines, sines [half]: of its angles, times length_factor.
  void (*qkv_rope)(const QkvRope& op, std::int64_t token, const float* cosines, const float* sines);
};

// The kernels that this processor can run, best first.
std::span<const ElementwiseKernels* const> elementwise_kernels();

extern const ElementwiseKernels kElementwiseAvx2, kElementwisePortable;

void rms_norm(const RmsNorm& op, ThreadPool& pool, const ElementwiseKernels& kernels = *elementwise_kernels()[0]);
void silu_mul(const GatedMul& op, ThreadPool& pool, const ElementwiseKernels& kernels = *elementwise_kernels()[0]);
void gelu_mul(const GatedMul& op, ThreadPool& pool, const ElementwiseKernels& kernels = *elementwise_kernels()[0]);
void qkv_rope(const QkvRope& op, ThreadPool& pool, const ElementwiseKernels& kernels = *elementwise_kernels()[0]);

}  // namespace mlx_server
