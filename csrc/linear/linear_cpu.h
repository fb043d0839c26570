// Linear layer on quantized weights for CPUs: plain pointers, no MLX.
#pragma once

#include <cstdint>
#include <span>

#include "common/thread_pool.h"

namespace mlx_server {

// y = x @ dequantize(weight).T in MLX's affine format: element k of a row is `q * scale + bias`, with the scale and
// bias of its group of group_size elements, and q in `bits` bits, lowest bits first.
struct QuantizedLinear {
  const float* x;              // [rows, k]
  const std::uint8_t* weight;  // [n, k * bits / 8]
  const float* scales;         // [n, k / group_size]
  const float* biases;         // [n, k / group_size]
  float* y;                    // [rows, n]
  std::int64_t rows, n, k;
  int group_size;  // 32, 64 or 128
  int bits;        // 2, 3, 4, 5, 6 or 8; 32: weight holds floats, there are no scales and biases, k is a multiple of 32
  const std::int32_t* x_rows = nullptr;  // [rows]: row r of y is made of row x_rows[r] of x, or of row r if null
};

// One instruction set's kernels. Each computes columns [n_begin, n_end) of y for all rows. Within one instruction set
// an element of y is the same to the last bit whichever kernel computes it.
struct LinearKernels {
  const char* name;
  std::int64_t max_direct_rows;
  // x in the order in which direct reads it, [rows, k].
  void (*pack)(const QuantizedLinear& op, float* packed);
  // Few rows: dequantizes in registers. packed is pack's result.
  void (*direct)(const QuantizedLinear& op, const float* packed, std::int64_t n_begin, std::int64_t n_end);
  // Many rows: dequantizes the columns once, into panel [n_end - n_begin rounded up to kColumns, k].
  void (*panel)(const QuantizedLinear& op, float* panel, std::int64_t n_begin, std::int64_t n_end);
  // bits of 32.
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
