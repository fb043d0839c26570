// Bookkeeping of the KV cache's fixed-size blocks. No MLX here: arrays live elsewhere, this hands out indices.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace mlx_server::kv {

using BlockId = std::int32_t;

// Blocks 0 … num_blocks - 1, each free or held by one or more owners. An owner is whoever called `allocate` or
// `retain`: a request, or a cache that keeps a block for later requests. A block is free again when its last owner
// releases it.
//
// Calls that throw change nothing. Not thread safe: one thread, the scheduler's, owns the pool.
class BlockPool {
 public:
  // Throws std::invalid_argument if num_blocks is negative.
  explicit BlockPool(BlockId num_blocks);

  // n blocks with one owner each, or none at all if fewer than n are free. The block freed last is handed out first.
  // Throws std::invalid_argument if n is negative.
  std::optional<std::vector<BlockId>> allocate(BlockId n);

  // One more owner for each of `ids`; an id that is listed twice gets two.
  // Throws std::out_of_range for an id outside the pool, std::invalid_argument for a block that is free.
  void retain(std::span<const BlockId> ids);

  // One owner less for each of `ids`; blocks without owner become free. The last of `ids` is handed out next.
  // Throws like `retain`, also when `ids` lists a block more often than it has owners.
  void release(std::span<const BlockId> ids);

  BlockId num_blocks() const { return static_cast<BlockId>(ref_counts_.size()); }
  BlockId num_free() const { return static_cast<BlockId>(free_.size()); }
  // Owners of a block, 0 if it is free. Throws std::out_of_range.
  std::int32_t ref_count(BlockId id) const;

  // Throws std::logic_error unless each block is either held or exactly once in the free list.
  void check_integrity() const;

 private:
  void check_in_range(BlockId id) const;
  void check_held(std::span<const BlockId> ids, const char* verb) const;
  void undo_release(std::span<const BlockId> ids, std::size_t num_free_before);

  std::vector<std::int32_t> ref_counts_;  // [num_blocks]
  std::vector<BlockId> free_;             // a stack
};

}  // namespace mlx_server::kv
