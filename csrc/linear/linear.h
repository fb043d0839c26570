// Linear layers.
#pragma once

#include <optional>
#include <string>

#include <mlx/array.h>
#include <mlx/utils.h>

namespace mlx_server {

// y = x @ weight.T
// x [..., K]; weight floating point [N, K]  ->  [..., N], the dtype of x
mlx::core::array linear(const mlx::core::array& x, const mlx::core::array& weight, mlx::core::StreamOrDevice s = {});

// y = x @ dequantize(weight).T in one of MLX's formats
// x [..., K]; weight uint32 [N, K * bits / 32]; scales [N, K / group_size]; biases like scales, in the mode affine
// alone
// ->  [..., N], the dtype of x
mlx::core::array quantized_linear(const mlx::core::array& x, const mlx::core::array& weight,
                                  const mlx::core::array& scales, const std::optional<mlx::core::array>& biases,
                                  int group_size, int bits, const std::string& mode = "affine",
                                  mlx::core::StreamOrDevice s = {});

}  // namespace mlx_server
