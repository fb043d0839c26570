// Linear layer on quantized weights.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

namespace mlx_server {

// y = x @ dequantize(weight).T in MLX's affine format
// x [..., K]; weight uint32 [N, K * bits / 32]; scales, biases [N, K / group_size]  ->  [..., N], the dtype of x
mlx::core::array quantized_linear(const mlx::core::array& x, const mlx::core::array& weight,
                                  const mlx::core::array& scales, const mlx::core::array& biases, int group_size,
                                  int bits, mlx::core::StreamOrDevice s = {});

}  // namespace mlx_server
