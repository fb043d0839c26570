#include "linear/linear.h"

#include <mlx/ops.h>

namespace mlx_server {

namespace mx = mlx::core;

mx::array quantized_linear(const mx::array& x, const mx::array& weight, const mx::array& scales,
                           const mx::array& biases, int group_size, int bits, mx::StreamOrDevice s) {
  return mx::quantized_matmul(x, weight, scales, biases, /*transpose=*/true, group_size, bits, "affine", s);
}

}  // namespace mlx_server
