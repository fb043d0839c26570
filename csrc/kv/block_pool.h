// Bookkeeping of the KV cache's fixed-size blocks. No MLX here: arrays live elsewhere, this hands out indices.
#pragma once

#include <cstdint>
#include <vector>

namespace mlx_server::kv {

using BlockId = std::int32_t;

}  // namespace mlx_server::kv
