// Samples one token from one row of logits on a CPU: plain pointers, no MLX. sampling.h says what is computed.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "sampling/row_kernels.h"

namespace mlx_server {

struct RowParams {
  float temperature;
  std::int32_t top_k;
  float top_p;
  float min_p;
  std::uint64_t seed;
  std::uint32_t position;
};

// What a row gives whose logits are not all below +infinity (or NaN), or are all -infinity.
inline constexpr std::uint32_t kInvalidToken = 0xFFFFFFFF;

// Memory that a thread keeps from row to row.
struct RowScratch {
  std::vector<Key> keys, near_keys;          // [padded(V)]
  std::vector<float> weights, near_weights;  // [padded(V)]
  std::vector<double> block_weights;         // [padded(V) / kRowPadding]
};

std::uint32_t sample_row(std::span<const float> logits, const RowParams& params, RowScratch& scratch,
                         const RowKernels& kernels = *row_kernels()[0]);

}  // namespace mlx_server
