#include "kv/block_pool.h"

#include <stdexcept>
#include <string>

namespace mlx_server::kv {

namespace {

std::vector<std::int32_t> no_owners(BlockId num_blocks) {
  if (num_blocks < 0) {
    throw std::invalid_argument("[BlockPool] num_blocks must be >= 0 but got " + std::to_string(num_blocks) + ".");
  }
  return std::vector<std::int32_t>(static_cast<std::size_t>(num_blocks), 0);
}

}  // namespace

BlockPool::BlockPool(BlockId num_blocks)
    : ref_counts_(no_owners(num_blocks)), cached_(ref_counts_.size(), false), idle_(num_blocks) {
  free_.reserve(ref_counts_.size());
  for (BlockId id = num_blocks - 1; id >= 0; --id) {
    free_.push_back(id);
  }
}

std::optional<std::vector<BlockId>> BlockPool::allocate(BlockId n) {
  if (n < 0) {
    throw std::invalid_argument("[BlockPool] allocate's n must be >= 0 but got " + std::to_string(n) + ".");
  }
  if (n > num_free()) {
    return std::nullopt;
  }
  std::vector<BlockId> ids(free_.rbegin(), free_.rbegin() + n);
  free_.resize(free_.size() - ids.size());
  for (BlockId id : ids) {
    ref_counts_[id] = 1;
  }
  return ids;
}

void BlockPool::retain(std::span<const BlockId> ids) {
  for (BlockId id : ids) {
    if (ref_count(id) == 0 && !cached_[id]) {
      throw std::invalid_argument("[BlockPool] retain got block " + std::to_string(id) + ", which is free.");
    }
  }
  for (BlockId id : ids) {
    if (ref_counts_[id]++ == 0) {
      idle_.remove(id);
    }
  }
}

void BlockPool::release(std::span<const BlockId> ids, std::string_view client) {
  for (BlockId id : ids) {
    check_in_range(id);
  }
  std::vector<BlockId> without_owner;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ref_counts_[ids[i]] == 0) {
      for (BlockId id : ids.first(i)) {
        ++ref_counts_[id];
      }
      throw std::invalid_argument("[BlockPool] release got block " + std::to_string(ids[i]) +
                                  " more often than it has owners.");
    }
    if (--ref_counts_[ids[i]] == 0) {
      without_owner.push_back(ids[i]);
    }
  }
  for (BlockId id : without_owner) {
    if (cached_[id]) {
      idle_.append(id, client);
    } else {
      free_.push_back(id);
    }
  }
}

void BlockPool::cache(BlockId id) {
  if (ref_count(id) == 0) {
    throw std::invalid_argument("[BlockPool] cache got block " + std::to_string(id) + ", which is not held.");
  }
  cached_[id] = true;
}

void BlockPool::uncache(BlockId id) {
  if (is_cached(id) && ref_counts_[id] == 0) {
    idle_.remove(id);
    free_.push_back(id);
  }
  cached_[id] = false;
}

std::int32_t BlockPool::ref_count(BlockId id) const {
  check_in_range(id);
  return ref_counts_[id];
}

bool BlockPool::is_cached(BlockId id) const {
  check_in_range(id);
  return cached_[id];
}

void BlockPool::check_integrity() const {
  std::vector<bool> is_free(ref_counts_.size(), false);
  const std::vector<bool> is_idle = idle_.check_integrity();
  for (BlockId id : free_) {
    if (id < 0 || id >= num_blocks()) {
      throw std::logic_error("[BlockPool] the free list holds block " + std::to_string(id) + ", outside the pool.");
    }
    if (is_free[id]) {
      throw std::logic_error("[BlockPool] block " + std::to_string(id) + " is twice in the free list.");
    }
    is_free[id] = true;
  }
  for (BlockId id = 0; id < num_blocks(); ++id) {
    const bool unheld = ref_counts_[id] == 0;
    if (is_free[id] != (unheld && !cached_[id]) || is_idle[id] != (unheld && cached_[id])) {
      throw std::logic_error("[BlockPool] block " + std::to_string(id) + " has " + std::to_string(ref_counts_[id]) +
                             " owners, is " + (cached_[id] ? "" : "not ") + "cached, " + (is_free[id] ? "" : "not ") +
                             "in the free list and " + (is_idle[id] ? "" : "not ") + "in the idle one.");
    }
  }
}

void BlockPool::check_in_range(BlockId id) const {
  if (id < 0 || id >= num_blocks()) {
    throw std::out_of_range("[BlockPool] block ids must be in [0, " + std::to_string(num_blocks()) + ") but got " +
                            std::to_string(id) + ".");
  }
}

}  // namespace mlx_server::kv
