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

BlockPool::BlockPool(BlockId num_blocks) : ref_counts_(no_owners(num_blocks)) {
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
  check_held(ids, "retain");
  for (BlockId id : ids) {
    ++ref_counts_[id];
  }
}

void BlockPool::release(std::span<const BlockId> ids) {
  check_held(ids, "release");
  const std::size_t num_free_before = free_.size();
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const BlockId id = ids[i];
    if (ref_counts_[id] == 0) {
      undo_release(ids.first(i), num_free_before);
      throw std::invalid_argument("[BlockPool] release got block " + std::to_string(id) +
                                  " more often than it has owners.");
    }
    if (--ref_counts_[id] == 0) {
      free_.push_back(id);
    }
  }
}

void BlockPool::undo_release(std::span<const BlockId> ids, std::size_t num_free_before) {
  free_.resize(num_free_before);
  for (BlockId id : ids) {
    ++ref_counts_[id];
  }
}

std::int32_t BlockPool::ref_count(BlockId id) const {
  check_in_range(id);
  return ref_counts_[id];
}

void BlockPool::check_integrity() const {
  std::vector<bool> is_free(ref_counts_.size(), false);
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
    if (is_free[id] != (ref_counts_[id] == 0)) {
      throw std::logic_error("[BlockPool] block " + std::to_string(id) + " has " + std::to_string(ref_counts_[id]) +
                             " owners but is " + (is_free[id] ? "in" : "not in") + " the free list.");
    }
  }
}

void BlockPool::check_in_range(BlockId id) const {
  if (id < 0 || id >= num_blocks()) {
    throw std::out_of_range("[BlockPool] block ids must be in [0, " + std::to_string(num_blocks()) + ") but got " +
                            std::to_string(id) + ".");
  }
}

void BlockPool::check_held(std::span<const BlockId> ids, const char* verb) const {
  for (BlockId id : ids) {
    check_in_range(id);
    if (ref_counts_[id] == 0) {
      throw std::invalid_argument(std::string("[BlockPool] ") + verb + " got block " + std::to_string(id) +
                                  ", which is free.");
    }
  }
}

}  // namespace mlx_server::kv
