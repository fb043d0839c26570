// Linear layer on quantized weights for CPUs: plain pointers, no MLX.
#pragma once

#include <cstdint>
#include <span>

#include "common/thread_pool.h"

namespace mlx_server {

// How a matrix [n, k] is stored: elements of `bits` bits, lowest bits first, in groups of group_size.
//   affine: 2, 3, 4, 5, 6 or 8 bits, groups of 32, 64 or 128; an element is `q * scale + bias` of its group
//   floating point: scale_codes instead of scales and biases. mxfp4, nvfp4: 4 bits, e2m1; mxfp8: 8 bits, e4m3. Scales
//   are
//     e8m0 in groups of 32, e4m3 in groups of 16. Elements are never NaN: its codes count as 480.
//   plain: 32 bits, floats, no scales
// k is a multiple of 32.
struct LinearWeights {
  const std::uint8_t* weight;  // [n, k * bits / 8]
  const float* scales;         // [n, k / group_size]
  const float* biases;         // [n, k / group_size]
  std::int64_t n, k;
  int group_size, bits;
  const std::uint8_t* scale_codes = nullptr;  // [n, k / group_size]

  bool is_plain() const { return bits == 32; }
  // Rows [begin, end)
  LinearWeights rows(std::int64_t begin, std::int64_t end) const;
};

// y = x @ w.T
struct QuantizedLinear {
  const float* x;  // [rows, k]
  LinearWeights w;
  float* y;  // [rows, n]
  std::int64_t rows;
  const std::int32_t* x_rows = nullptr;  // [rows]: row r of y is made of row x_rows[r] of x, or of row r if null
};

// One instruction set's kernels. Each computes columns [n_begin, n_end) of y for all rows. Within one instruction set
// an element of y is the same to the last bit whichever kernel computes it.
struct LinearKernels {
  const char* name;
  std::int64_t max_direct_rows;
  std::int64_t max_near_rows;  // as many if x stays in the L1 cache; not less
  // x in the order in which direct reads it, rows * k elements.
  void (*pack)(const QuantizedLinear& op, float* packed);
  // Few rows: dequantizes in registers. packed is pack's result.
  void (*direct)(const QuantizedLinear& op, const float* packed, std::int64_t n_begin, std::int64_t n_end);
  // Many rows: dequantizes the columns once, into panel [n_end - n_begin rounded up to kColumns, k].
  void (*panel)(const QuantizedLinear& op, float* panel, std::int64_t n_begin, std::int64_t n_end);
  // Plain weights.
  void (*plain)(const QuantizedLinear& op, std::int64_t n_begin, std::int64_t n_end);

  static constexpr int kColumns = 4;  // of y, computed side by side
};

// The kernels that this processor can run, best first.
std::span<const LinearKernels* const> linear_kernels();

// Columns of weights [n, k] for a thread's turn: their dequantized form stays in its L2 cache.
std::int64_t panel_columns(std::int64_t n, std::int64_t k, int num_threads);

// On the calling thread alone: n should be at most panel_columns.
void quantized_linear_tile(const QuantizedLinear& op, const LinearKernels& kernels);

void quantized_linear(const QuantizedLinear& op, ThreadPool& pool, const LinearKernels& kernels = *linear_kernels()[0]);

}  // namespace mlx_server
