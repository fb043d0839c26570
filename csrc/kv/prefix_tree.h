// Finds the blocks that already hold the KV of a request's first tokens. No MLX here.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kv/block_pool.h"

namespace mlx_server::kv {

using TokenId = std::int32_t;

// A radix tree over token ids whose every edge is one block: block_size tokens, and the block of the pool that holds
// their KV. A node is named by its block. What a path from the root spells is what its blocks' KV depends on; paths of
// different salts have nothing in common. A leaf may be the unfinished end of a request, a tail of fewer tokens.
//
// Children are found by a hash of (parent or salt, tokens), keyed at random so that nobody can make it collide, and
// then compared whole: a collision costs time, never a wrong block.
//
// The tree marks the blocks that it holds as cached in the pool, so that they stay when nobody owns them. It owns
// none: whoever uses a block retains it. If each request owns the whole path to its last block, and releases the last
// block first, then of each client the idle block released longest ago has nothing of the client's following on it.
//
// Costs: match and insert O(tokens given), match_part O(block_size), evict and remove O(blocks removed). Not thread
// safe.
class PrefixTree {
 public:
  // What a block shares with the tokens looked up: its first num_tokens, which may be all that it holds.
  struct Part {
    BlockId block;
    std::int32_t num_tokens;
    bool is_whole;
  };

  // How many of the blocks that follow on one, the newest first, match_part looks at.
  static constexpr int kMaxLooked = 32;

  // The pool must outlive the tree, which alone may mark its blocks. Throws std::invalid_argument if block_size < 1.
  PrefixTree(BlockPool& pool, std::int32_t block_size);

  // The blocks that hold `tokens`, as many in a row as there are, full blocks only; `after` is the block that holds
  // the tokens just before, none if `tokens` begin a request. Empty if `after` is not in the tree (any more).
  // Throws std::out_of_range if `after` is outside the pool.
  std::vector<BlockId> match(std::string_view salt, std::optional<BlockId> after,
                             std::span<const TokenId> tokens) const;

  // Of the blocks that follow on `after`, as above, the one that begins with the most of `tokens`; a tail where two are
  // alike. None if none begins with any, or `after` is not in the tree. Throws std::out_of_range as above.
  std::optional<Part> match_part(std::string_view salt, std::optional<BlockId> after,
                                 std::span<const TokenId> tokens) const;

  // Lets others find `block`, which is held and holds the KV of the tokens that follow on `after`: block_size, or fewer
  // for a tail. The block that the tree has for these tokens: `block`, or the one that was there before. None, and
  // nothing changed, if `after` is not in the tree (any more): nobody can find what follows on it. `block` may be in
  // the tree as a tail already, with the first of these tokens.
  // Throws std::invalid_argument if there are no tokens or more than block_size, `after` is a tail, or `block` is not
  // held or holds other tokens in the tree, std::out_of_range if a block is outside the pool.
  std::optional<BlockId> insert(std::string_view salt, std::optional<BlockId> after, std::span<const TokenId> tokens,
                                BlockId block);

  // Takes idle blocks out of the tree, in the pool's order, until n more are free or none is idle. What follows on them
  // leaves the tree too. The blocks that left it, free now unless they are held.
  std::vector<BlockId> evict(BlockId n);

  // Takes a block and all that follows on it out of the tree; what left it, as `evict`. Nothing if it is not in it.
  std::vector<BlockId> remove(BlockId block);

  // Takes all blocks out.
  void clear();

  BlockId num_blocks() const { return static_cast<BlockId>(index_.size()); }
  std::int32_t block_size() const { return block_size_; }

  // Throws std::logic_error unless the tree is one: each cached block of the pool can be found from its parent by its
  // tokens, and no other.
  void check_integrity() const;

 private:
  static constexpr BlockId kNone = -1;

  struct Node {  // meaningful where the pool says that the block is cached
    std::uint64_t hash = 0;
    BlockId parent = kNone;  // kNone: the root of its salt
    BlockId first_child = kNone, previous_sibling = kNone, next_sibling = kNone;
    std::int32_t num_tokens = 0;
  };

  std::uint64_t hash(std::string_view salt, BlockId parent, std::span<const TokenId> tokens) const;
  BlockId find(std::uint64_t hash, std::string_view salt, BlockId parent, std::span<const TokenId> tokens) const;
  bool holds(BlockId id, std::string_view salt, BlockId parent, std::span<const TokenId> tokens) const;
  std::span<const TokenId> tokens_of(BlockId id) const;
  // The newest child of a block, or of a salt's root; kNone.
  BlockId first_child(std::string_view salt, BlockId parent) const;
  bool continues_tail(BlockId id, std::string_view salt, BlockId parent, std::span<const TokenId> tokens) const;
  void link(BlockId id, std::string_view salt, BlockId parent);
  void unlink(BlockId id);
  void forget(BlockId id);

  BlockPool& pool_;
  std::int32_t block_size_;
  std::uint64_t key_;
  std::vector<Node> nodes_;                                // [pool's blocks]
  std::vector<TokenId> tokens_;                            // [pool's blocks, block_size]
  std::unordered_multimap<std::uint64_t, BlockId> index_;  // by hash; all blocks in the tree
  std::unordered_map<BlockId, std::string> salts_;         // of those that begin a request
  std::unordered_map<std::string, BlockId> roots_;         // the newest of those, by salt
};

}  // namespace mlx_server::kv
