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
  const float *gate, *up;  // [size]
  float* y;                // [size]
  std::int64_t size;
};

struct Rope {
  const float* x;                 // [tokens, heads, d], tokens token_stride apart
  const std::int32_t* positions;  // [tokens]
  const float* freqs;             // [half]
  float* y;                       // [tokens, heads, d]
  std::int64_t tokens, heads, d, half, token_stride;
  bool traditional;
};

// One instruction set's kernels.
struct ElementwiseKernels {
  const char* name;
  void (*rms_norm)(const RmsNorm& op);
  void (*silu_mul)(const GatedMul& op);
  void (*gelu_mul)(const GatedMul& op);
};

// The kernels that this processor can run, best first.
std::span<const ElementwiseKernels* const> elementwise_kernels();

extern const ElementwiseKernels kElementwiseAvx2, kElementwisePortable;

void rms_norm(const RmsNorm& op, ThreadPool& pool, const ElementwiseKernels& kernels = *elementwise_kernels()[0]);
void silu_mul(const GatedMul& op, ThreadPool& pool, const ElementwiseKernels& kernels = *elementwise_kernels()[0]);
void gelu_mul(const GatedMul& op, ThreadPool& pool, const ElementwiseKernels& kernels = *elementwise_kernels()[0]);
void rope(const Rope& op, ThreadPool& pool);

}  // namespace mlx_server
