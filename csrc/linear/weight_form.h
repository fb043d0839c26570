// How the arrays of a matrix are stored, for primitives whose CPU kernels read them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <mlx/array.h>

#include "linear/linear_cpu.h"

namespace mlx_server {

struct WeightForm {
  int group_size, bits;  // 0 and 32 if plain
  bool is_float;         // mxfp4, mxfp8, nvfp4

  bool operator==(const WeightForm&) const = default;
};

// The form of a matrix [..., K], if there are kernels for it. Without scales it is plain.
std::optional<WeightForm> weight_form(const mlx::core::array& weight, const std::optional<mlx::core::array>& scales,
                                      const std::optional<mlx::core::array>& biases, int group_size, int bits,
                                      const std::string& mode, int k);

// A matrix [n, k] of the arrays weight, scales and biases, as many as the form has, from inputs[next] on; moves next
// behind them. Rows are without gaps.
LinearWeights linear_weights(const WeightForm& form, const std::vector<mlx::core::array>& inputs, std::size_t& next,
                             std::int64_t n, std::int64_t k);

}  // namespace mlx_server
