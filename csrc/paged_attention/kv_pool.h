// Memory for the KV cache.
#pragma once

#include <mlx/array.h>
#include <mlx/utils.h>

namespace mlx_server {

// A pool [N, block_size, Hk, D] with undefined contents. On the CPU, where the system maps memory on first use, blocks
// that no token was ever written to take none.
mlx::core::array new_kv_pool(const mlx::core::Shape& shape, mlx::core::Dtype dtype, mlx::core::StreamOrDevice s = {});

}  // namespace mlx_server
