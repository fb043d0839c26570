// Quantized linear layers on GPUs.
#pragma once

#include <optional>
#include <string>

#include <mlx/array.h>
#include <mlx/stream.h>

namespace mlx_server {

// linear (linear.h) on a GPU stream. The arguments are valid.
mlx::core::array linear_gpu(const mlx::core::array& x, const mlx::core::array& weight, mlx::core::Stream s);

// quantized_linear (linear.h) on a GPU stream, by what is fastest there for this number of rows. The arguments are
// valid.
mlx::core::array quantized_linear_gpu(const mlx::core::array& x, const mlx::core::array& weight,
                                      const mlx::core::array& scales, const std::optional<mlx::core::array>& biases,
                                      int group_size, int bits, const std::string& mode, mlx::core::Stream s);

}  // namespace mlx_server
