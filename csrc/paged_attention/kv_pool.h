// Memory for the KV cache of one layer.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <mlx/array.h>
#include <mlx/utils.h>

namespace mlx_server {

// N blocks of block_size tokens each. With scales, keys and values are 8-bit integers to be multiplied by their scale.
struct KVPool {
  mlx::core::array keys;                                     // [N, block_size, Hk, D]
  mlx::core::array values;                                   // likewise
  std::optional<mlx::core::array> key_scales, value_scales;  // float32 [N, block_size, Hk], both or none

  int block_size() const { return keys.shape(1); }
  int num_heads() const { return keys.shape(2); }
  int head_dim() const { return keys.shape(3); }
};

// Checks shapes and dtypes for the op of that name.
void check_kv_pool(const char* op, const KVPool& pool);

// A pool of that shape [N, block_size, Hk, D] with undefined contents; with bits, which must be 8, of integers and
// scales instead of `dtype`. On the CPU, where the system maps memory on first use, blocks that no token was ever
// written to take none.
KVPool new_kv_pool(const mlx::core::Shape& shape, mlx::core::Dtype dtype, std::optional<int> bits = {},
                   mlx::core::StreamOrDevice s = {});

// Stores keys and values k, v [T, Hk, D], rounded to what the pool holds, and returns the new pool. Token t goes to
// slot slot_mapping[t] = block * block_size + offset; slots are distinct. The result takes over the pool's memory
// (common/write_rows.h).
KVPool write_kv(const KVPool& pool, const mlx::core::array& k, const mlx::core::array& v,
                const mlx::core::array& slot_mapping, mlx::core::StreamOrDevice s = {});

// The specification: the same, rounded by MLX's own ops.
KVPool write_kv_fallback(const KVPool& pool, const mlx::core::array& k, const mlx::core::array& v,
                         const mlx::core::array& slot_mapping, mlx::core::StreamOrDevice s = {});

// The new pool, whose slots to[i] hold what from[i] held, in place as above. All are read before any is written. Throws
// std::invalid_argument if from and to differ in length or `to` names a slot twice, std::out_of_range for a slot
// outside the pool.
KVPool copy_kv(const KVPool& pool, const std::vector<std::int32_t>& from, const std::vector<std::int32_t>& to,
               mlx::core::StreamOrDevice s = {});

}  // namespace mlx_server
