#include "kv/prefix_tree.h"

#include <algorithm>
#include <random>
#include <stdexcept>

namespace mlx_server::kv {

namespace {

// splitmix64's (Steele, Lea, Flood 2014): each bit of the input changes half of the output's.
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

std::uint64_t random_key() {
  std::random_device device;
  return (static_cast<std::uint64_t>(device()) << 32) | device();
}

}  // namespace

PrefixTree::PrefixTree(BlockPool& pool, std::int32_t block_size)
    : pool_(pool), block_size_(block_size), key_(random_key()) {
  if (block_size < 1) {
    throw std::invalid_argument("[PrefixTree] block_size must be >= 1 but got " + std::to_string(block_size) + ".");
  }
  const auto num_blocks = static_cast<std::size_t>(pool.num_blocks());
  nodes_.resize(num_blocks);
  tokens_.resize(num_blocks * static_cast<std::size_t>(block_size));
}

std::vector<BlockId> PrefixTree::match(std::string_view salt, std::optional<BlockId> after,
                                       std::span<const TokenId> tokens) const {
  std::vector<BlockId> blocks;
  if (after && !pool_.is_cached(*after)) {
    return blocks;
  }
  BlockId parent = after.value_or(kNone);
  const auto size = static_cast<std::size_t>(block_size_);
  for (std::size_t start = 0; start + size <= tokens.size(); start += size) {
    const auto block_tokens = tokens.subspan(start, size);
    parent = find(hash(salt, parent, block_tokens), salt, parent, block_tokens);
    if (parent == kNone) {
      break;
    }
    blocks.push_back(parent);
  }
  return blocks;
}

std::optional<PrefixTree::Part> PrefixTree::match_part(std::string_view salt, std::optional<BlockId> after,
                                                       std::span<const TokenId> tokens) const {
  if (after && !pool_.is_cached(*after)) {
    return std::nullopt;
  }
  std::optional<Part> best;
  int num_looked = 0;
  for (BlockId child = first_child(salt, after.value_or(kNone)); child != kNone && num_looked < kMaxLooked;
       child = nodes_[child].next_sibling, ++num_looked) {
    const auto its_tokens = tokens_of(child);
    const auto num_shared = std::ranges::mismatch(its_tokens, tokens).in1 - its_tokens.begin();
    const Part part{child, static_cast<std::int32_t>(num_shared), num_shared == nodes_[child].num_tokens};
    const int num_best = best ? best->num_tokens : 0;
    if (part.num_tokens > num_best || (part.num_tokens == num_best && num_best > 0 && part.is_whole)) {
      best = part;
    }
  }
  return best;
}

std::optional<BlockId> PrefixTree::insert(std::string_view salt, std::optional<BlockId> after,
                                          std::span<const TokenId> tokens, BlockId block) {
  if (tokens.empty() || tokens.size() > static_cast<std::size_t>(block_size_)) {
    throw std::invalid_argument("[PrefixTree] insert must get 1 to " + std::to_string(block_size_) +
                                " tokens but got " + std::to_string(tokens.size()) + ".");
  }
  if (after && !pool_.is_cached(*after)) {
    return std::nullopt;
  }
  const BlockId parent = after.value_or(kNone);
  if (after && nodes_[parent].num_tokens < block_size_) {
    throw std::invalid_argument("[PrefixTree] nothing can follow on block " + std::to_string(parent) +
                                ", which is not full.");
  }
  const std::uint64_t its_hash = hash(salt, parent, tokens);
  if (const BlockId known = find(its_hash, salt, parent, tokens); known != kNone) {
    return known;
  }
  const bool is_tail = pool_.is_cached(block);
  if (is_tail && !continues_tail(block, salt, parent, tokens)) {
    throw std::invalid_argument("[PrefixTree] insert got block " + std::to_string(block) +
                                ", which holds other tokens in the tree.");
  }
  pool_.cache(block);
  if (is_tail) {
    remove(block);
    pool_.cache(block);
  }
  std::ranges::copy(tokens, tokens_.begin() + static_cast<std::ptrdiff_t>(block) * block_size_);
  nodes_[block] = Node{.hash = its_hash, .num_tokens = static_cast<std::int32_t>(tokens.size())};
  link(block, salt, parent);
  index_.emplace(its_hash, block);
  if (parent == kNone) {
    salts_.emplace(block, salt);
  }
  return block;
}

std::vector<BlockId> PrefixTree::evict(BlockId n) {
  std::vector<BlockId> removed;
  const BlockId target = pool_.num_free() + n;
  while (pool_.num_free() < target) {
    const auto next = pool_.next_idle();
    if (!next) {
      break;
    }
    const auto ids = remove(*next);
    removed.insert(removed.end(), ids.begin(), ids.end());
  }
  return removed;
}

std::vector<BlockId> PrefixTree::remove(BlockId block) {
  if (!pool_.is_cached(block)) {
    return {};
  }
  unlink(block);
  std::vector<BlockId> subtree{block};  // parents before children
  for (std::size_t i = 0; i < subtree.size(); ++i) {
    for (BlockId child = nodes_[subtree[i]].first_child; child != kNone; child = nodes_[child].next_sibling) {
      subtree.push_back(child);
    }
    forget(subtree[i]);
  }
  return subtree;
}

void PrefixTree::clear() {
  for (const auto& [hash, block] : index_) {
    pool_.uncache(block);
  }
  index_.clear();
  salts_.clear();
  roots_.clear();
}

void PrefixTree::check_integrity() const {
  for (const auto& [hash, block] : index_) {
    const Node& node = nodes_[block];
    const auto salt = salts_.find(block);
    const bool begins = node.parent == kNone;
    const std::string_view its_salt = begins && salt != salts_.end() ? std::string_view(salt->second) : "";
    const bool is_child = (begins || (pool_.is_cached(node.parent) && nodes_[node.parent].num_tokens == block_size_)) &&
                          (node.previous_sibling == kNone ? first_child(its_salt, node.parent) == block
                                                          : nodes_[node.previous_sibling].next_sibling == block);
    if (!pool_.is_cached(block) || hash != node.hash || begins != (salt != salts_.end()) || !is_child ||
        hash != this->hash(its_salt, node.parent, tokens_of(block)) ||
        find(hash, its_salt, node.parent, tokens_of(block)) != block) {
      throw std::logic_error("[PrefixTree] block " + std::to_string(block) + " can't be found as it should.");
    }
  }
  BlockId num_cached = 0;
  for (BlockId id = 0; id < pool_.num_blocks(); ++id) {
    num_cached += pool_.is_cached(id);
  }
  if (num_cached != num_blocks()) {
    throw std::logic_error("[PrefixTree] " + std::to_string(num_cached) + " blocks are cached but " +
                           std::to_string(num_blocks()) + " can be found.");
  }
}

std::uint64_t PrefixTree::hash(std::string_view salt, BlockId parent, std::span<const TokenId> tokens) const {
  std::uint64_t h = mix(key_ + static_cast<std::uint64_t>(static_cast<std::int64_t>(parent)));
  if (parent == kNone) {
    for (unsigned char c : salt) {
      h = mix(h + c);
    }
  }
  for (TokenId token : tokens) {
    h = mix(h + static_cast<std::uint32_t>(token));
  }
  return h;
}

BlockId PrefixTree::find(std::uint64_t hash, std::string_view salt, BlockId parent,
                         std::span<const TokenId> tokens) const {
  const auto [begin, end] = index_.equal_range(hash);
  const auto found =
      std::find_if(begin, end, [&](const auto& entry) { return holds(entry.second, salt, parent, tokens); });
  return found == end ? kNone : found->second;
}

bool PrefixTree::holds(BlockId id, std::string_view salt, BlockId parent, std::span<const TokenId> tokens) const {
  return nodes_[id].parent == parent && std::ranges::equal(tokens_of(id), tokens) &&
         (parent != kNone || salts_.at(id) == salt);
}

std::span<const TokenId> PrefixTree::tokens_of(BlockId id) const {
  return std::span(tokens_).subspan(static_cast<std::size_t>(id) * static_cast<std::size_t>(block_size_),
                                    static_cast<std::size_t>(nodes_[id].num_tokens));
}

BlockId PrefixTree::first_child(std::string_view salt, BlockId parent) const {
  if (parent != kNone) {
    return nodes_[parent].first_child;
  }
  const auto root = roots_.find(std::string(salt));
  return root == roots_.end() ? kNone : root->second;
}

bool PrefixTree::continues_tail(BlockId id, std::string_view salt, BlockId parent,
                                std::span<const TokenId> tokens) const {
  const auto its_tokens = tokens_of(id);
  return its_tokens.size() < tokens.size() && holds(id, salt, parent, its_tokens) &&
         std::ranges::equal(its_tokens, tokens.first(its_tokens.size()));
}

void PrefixTree::link(BlockId id, std::string_view salt, BlockId parent) {
  nodes_[id].parent = parent;
  BlockId& first =
      parent == kNone ? roots_.try_emplace(std::string(salt), kNone).first->second : nodes_[parent].first_child;
  nodes_[id].next_sibling = first;
  if (first != kNone) {
    nodes_[first].previous_sibling = id;
  }
  first = id;
}

void PrefixTree::unlink(BlockId id) {
  const Node& node = nodes_[id];
  if (node.previous_sibling != kNone) {
    nodes_[node.previous_sibling].next_sibling = node.next_sibling;
  } else if (node.parent != kNone) {
    nodes_[node.parent].first_child = node.next_sibling;
  } else if (node.next_sibling != kNone) {
    roots_[salts_.at(id)] = node.next_sibling;
  } else {
    roots_.erase(salts_.at(id));
  }
  if (node.next_sibling != kNone) {
    nodes_[node.next_sibling].previous_sibling = node.previous_sibling;
  }
}

void PrefixTree::forget(BlockId id) {
  const auto [begin, end] = index_.equal_range(nodes_[id].hash);
  index_.erase(std::find_if(begin, end, [id](const auto& entry) { return entry.second == id; }));
  salts_.erase(id);
  pool_.uncache(id);
}

}  // namespace mlx_server::kv
