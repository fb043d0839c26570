// Bookkeeping of the KV cache's fixed-size blocks. No MLX here: arrays live elsewhere, this hands out indices.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "kv/idle_list.h"

namespace mlx_server::kv {

// Blocks 0 … num_blocks - 1. Each is in one of three states:
//
//   free   no owner, nothing worth keeping       in the free list
//   held   one or more owners                    in no list
//   idle   no owner, but cached for later use    in a list, in the order in which they are to go
//
// An owner is whoever called `allocate` or `retain`: a request. Held and idle blocks may be marked as cached, by the
// prefix tree alone: such a block is idle, not free, when its last owner has released it.
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

  // One owner less for each of `ids`; blocks without owner become free or idle. The last of `ids` is handed out next
  // if it is free; if it is idle, it is the last of this client's to go.
  // Throws std::out_of_range for an id outside the pool, std::invalid_argument for a block that is listed more often
  // than it has owners.
  void release(std::span<const BlockId> ids, std::string_view client = {});

  // Marks a block that is held. Throws std::out_of_range, or std::invalid_argument if it is not held.
  void cache(BlockId id);
  // Takes the mark away: an idle block becomes free. Throws std::out_of_range.
  void uncache(BlockId id);
  // The idle block that is to go next: the one released longest ago of the client with the most idle blocks.
  std::optional<BlockId> next_idle() const { return idle_.next(); }

  BlockId num_blocks() const { return static_cast<BlockId>(ref_counts_.size()); }
  BlockId num_free() const { return static_cast<BlockId>(free_.size()); }
  BlockId num_idle() const { return idle_.size(); }
  // Owners of a block, 0 if it is free or idle. Throws std::out_of_range.
  std::int32_t ref_count(BlockId id) const;
  // Whether a block is marked. Throws std::out_of_range.
  bool is_cached(BlockId id) const;

  // Throws std::logic_error unless each block is either held, or exactly once in the list of its state.
  void check_integrity() const;

 private:
  void check_in_range(BlockId id) const;

  std::vector<std::int32_t> ref_counts_;  // [num_blocks]
  std::vector<bool> cached_;              // [num_blocks]
  std::vector<BlockId> free_;             // a stack
  IdleList idle_;
};

}  // namespace mlx_server::kv
