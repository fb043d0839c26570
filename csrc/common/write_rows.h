// Writes into a pool that outlives steps: KV blocks, slots of recurrent state.
#pragma once

#include <cstdint>
#include <vector>

#include <mlx/array.h>
#include <mlx/utils.h>

namespace mlx_server {

// pool [N, ...] with rows [T, ...] at pool[slots[t]], slots int32 [T] and distinct; their values are not checked. rows
// have the pool's dtype. The result takes over the pool's memory, which must not be used again except through it.
//
// MLX's scatter writes in place only into memory that nothing else refers to, but a step in flight refers to the pools
// that it reads: launching the next one would copy them all. Here that is safe: the step in flight reads no row that
// the next one writes, and in its own step a row is read only through the result.
mlx::core::array write_rows(const mlx::core::array& pool, const mlx::core::array& slots, const mlx::core::array& rows,
                            mlx::core::Stream s);

// pool [N, ...] with pool[to[i]] = pool[from[i]] as it was before, in place as above. Throws std::invalid_argument if
// from and to differ in length or `to` names a row twice, std::out_of_range for a row outside the pool.
mlx::core::array copy_rows(const mlx::core::array& pool, const std::vector<std::int32_t>& from,
                           const std::vector<std::int32_t>& to, mlx::core::StreamOrDevice s = {});

}  // namespace mlx_server
