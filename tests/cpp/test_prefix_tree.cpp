#include "kv/prefix_tree.h"

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "check.h"

namespace {

using mlx_server::kv::BlockId;
using mlx_server::kv::BlockPool;
using mlx_server::kv::PrefixTree;
using mlx_server::kv::TokenId;
using Ids = std::vector<BlockId>;
using Tokens = std::vector<TokenId>;

constexpr std::nullopt_t kBegin = std::nullopt;

// Puts `tokens`, in blocks of `size`, into the tree as a request does; the blocks, which the caller owns.
Ids put(BlockPool& pool, PrefixTree& tree, const std::string& salt, const Tokens& tokens) {
  Ids path = tree.match(salt, kBegin, tokens);
  pool.retain(path);
  const auto size = static_cast<std::size_t>(tree.block_size());
  for (std::size_t start = path.size() * size; start + size <= tokens.size(); start += size) {
    const BlockId block = pool.allocate(1)->front();
    const auto after = path.empty() ? std::nullopt : std::optional(path.back());
    CHECK(tree.insert(salt, after, std::span(tokens).subspan(start, size), block) == block);
    path.push_back(block);
  }
  return path;
}

void release(BlockPool& pool, Ids path, const std::string& client = "") {
  std::ranges::reverse(path);
  pool.release(path, client);
}

TEST(finds_full_blocks_of_a_common_prefix) {
  BlockPool pool(8);
  PrefixTree tree(pool, 2);
  const Ids path = put(pool, tree, "", {1, 2, 3, 4, 5});
  CHECK(path.size() == 2);
  CHECK(tree.match("", kBegin, Tokens{1, 2, 3, 4, 5, 6}) == path);
  CHECK(tree.match("", kBegin, Tokens{1, 2, 3}) == Ids{path[0]});
  CHECK(tree.match("", kBegin, Tokens{1, 2, 4, 4}) == Ids{path[0]});
  CHECK(tree.match("", kBegin, Tokens{3, 4}).empty());
  CHECK(tree.match("", path[0], Tokens{3, 4}) == Ids{path[1]});
  CHECK(tree.match("", path[1], Tokens{3, 4}).empty());
  CHECK(tree.match("", kBegin, Tokens{}).empty());
  tree.check_integrity();
}

TEST(salts_have_nothing_in_common) {
  BlockPool pool(8);
  PrefixTree tree(pool, 2);
  const Ids plain = put(pool, tree, "", {1, 2, 3, 4}), salted = put(pool, tree, "a", {1, 2, 3, 4});
  CHECK(plain != salted);
  CHECK(tree.match("", kBegin, Tokens{1, 2, 3, 4}) == plain);
  CHECK(tree.match("a", kBegin, Tokens{1, 2, 3, 4}) == salted);
  CHECK(tree.match("b", kBegin, Tokens{1, 2, 3, 4}).empty());
  tree.check_integrity();
}

TEST(a_second_block_of_the_same_tokens_is_not_taken) {
  BlockPool pool(4);
  PrefixTree tree(pool, 2);
  const Ids blocks = *pool.allocate(2);
  CHECK(tree.insert("", kBegin, Tokens{1, 2}, blocks[0]) == blocks[0]);
  CHECK(tree.insert("", kBegin, Tokens{1, 2}, blocks[1]) == blocks[0]);
  CHECK(!pool.is_cached(blocks[1]));
  pool.release(blocks);
  CHECK(pool.num_free() == 3 && pool.num_idle() == 1);
}

TEST(evicts_leaves_released_longest_ago_first) {
  BlockPool pool(5);
  PrefixTree tree(pool, 1);
  const Ids first = put(pool, tree, "", {1, 2, 3}), second = put(pool, tree, "", {1, 5});
  release(pool, first);  // block of 1 is still owned
  release(pool, second);
  CHECK(tree.evict(0).empty());
  CHECK(tree.evict(1).empty() == false && tree.match("", kBegin, Tokens{1, 2, 3}) == (Ids{first[0], first[1]}));
  CHECK(tree.evict(2) == (Ids{first[1], second[1]}));
  CHECK(tree.evict(9) == Ids{first[0]});
  CHECK(tree.evict(1).empty());
  CHECK(pool.num_free() == 5);
  pool.check_integrity();
  tree.check_integrity();
}

TEST(a_block_that_is_used_again_stays_longer) {
  BlockPool pool(2);
  PrefixTree tree(pool, 1);
  const Ids a = put(pool, tree, "", {1}), b = put(pool, tree, "", {2});
  release(pool, a);
  release(pool, b);
  release(pool, put(pool, tree, "", {1}));
  CHECK(tree.evict(1) == b);
}

TEST(what_follows_on_a_removed_block_leaves_with_it) {
  BlockPool pool(6);
  PrefixTree tree(pool, 1);
  const Ids path = put(pool, tree, "", {1, 2, 3}), branch = put(pool, tree, "", {1, 2, 4});
  pool.release(Ids{path[0], branch[0], path[1], branch[1]});  // as behind a window
  CHECK(tree.evict(1) == (Ids{path[0], path[1], branch[2], path[2]}));
  CHECK(pool.num_free() == 4 && pool.ref_count(path[2]) == 1);
  CHECK(!tree.insert("", path[2], Tokens{5}, pool.allocate(1)->front()));
  CHECK(tree.match("", path[2], Tokens{5}).empty());
  CHECK(tree.remove(path[2]).empty());
  tree.check_integrity();
}

TEST(clear_keeps_what_is_held) {
  BlockPool pool(4);
  PrefixTree tree(pool, 1);
  release(pool, put(pool, tree, "x", {1, 2}));
  const Ids held = put(pool, tree, "", {3});
  tree.clear();
  CHECK(tree.num_blocks() == 0 && pool.num_free() == 3 && pool.ref_count(held[0]) == 1);
  CHECK(tree.match("", kBegin, Tokens{3}).empty());
  tree.check_integrity();
  pool.check_integrity();
}

// The block that shares most with the tokens after `after`: it, how many, and whether it holds no others.
void check_part(const PrefixTree& tree, std::optional<BlockId> after, const Tokens& tokens, BlockId block,
                int num_tokens, bool is_whole) {
  const auto part = tree.match_part("", after, tokens);
  CHECK(part && part->block == block && part->num_tokens == num_tokens && part->is_whole == is_whole);
}

TEST(finds_the_block_that_begins_alike) {
  BlockPool pool(8);
  PrefixTree tree(pool, 4);
  const Ids trunk = put(pool, tree, "", {1, 2, 3, 4, 5, 6, 7, 8}),
            branch = put(pool, tree, "", {1, 2, 3, 4, 5, 9, 9, 9});
  check_part(tree, trunk[0], {5, 6, 7}, trunk[1], 3, false);
  check_part(tree, trunk[0], {5, 9}, branch[1], 2, false);
  check_part(tree, kBegin, {1, 2, 9}, trunk[0], 2, false);
  CHECK(!tree.match_part("", trunk[0], Tokens{6}) && !tree.match_part("", trunk[0], Tokens{}));
  CHECK(!tree.match_part("a", kBegin, Tokens{1, 2}) && !tree.match_part("", trunk[1], Tokens{1, 2}));
  CHECK_THROWS(tree.match_part("", 8, Tokens{1}), std::out_of_range);

  const BlockId tail = pool.allocate(1)->front();
  CHECK(tree.insert("", trunk[0], Tokens{5, 6}, tail) == tail);
  check_part(tree, trunk[0], {5, 6, 8}, tail, 2, true);  // rather than a part of the trunk
  check_part(tree, trunk[0], {5, 6, 7, 8}, trunk[1], 4, true);
  CHECK(tree.match("", trunk[0], Tokens{5, 6, 7, 8}) == Ids{trunk[1]});
  tree.check_integrity();
}

TEST(a_tail_grows_until_it_is_full) {
  BlockPool pool(3);
  PrefixTree tree(pool, 3);
  const BlockId block = pool.allocate(1)->front();
  CHECK(tree.insert("s", kBegin, Tokens{1}, block) == block);
  CHECK(tree.insert("s", kBegin, Tokens{1, 2}, block) == block);
  CHECK_THROWS(tree.insert("s", kBegin, Tokens{1, 3, 4}, block), std::invalid_argument);  // other tokens
  CHECK_THROWS(tree.insert("s", kBegin, Tokens{1}, block), std::invalid_argument);        // fewer
  CHECK_THROWS(tree.insert("", kBegin, Tokens{1, 2, 3}, block), std::invalid_argument);   // another salt
  const BlockId next = pool.allocate(1)->front();
  CHECK_THROWS(tree.insert("s", block, Tokens{4}, next), std::invalid_argument);
  pool.release(Ids{block});
  CHECK_THROWS(tree.insert("s", kBegin, Tokens{1, 2, 3}, block), std::invalid_argument);  // nobody's
  CHECK(tree.num_blocks() == 1 && pool.num_idle() == 1);
  pool.retain(Ids{block});
  CHECK(tree.insert("s", kBegin, Tokens{1, 2, 3}, block) == block);
  CHECK(tree.insert("s", block, Tokens{4}, next) == next);
  CHECK(tree.match("s", kBegin, Tokens{1, 2, 3, 4}) == Ids{block} && tree.num_blocks() == 2);
  tree.check_integrity();
  pool.release(Ids{next, block});
  CHECK(tree.evict(3) == (Ids{next, block}));
  tree.check_integrity();
}

TEST(looks_at_the_newest_blocks_only) {
  constexpr int kMany = PrefixTree::kMaxLooked;
  BlockPool pool(kMany + 1);
  PrefixTree tree(pool, 2);
  for (int i = 0; i <= kMany; ++i) {
    put(pool, tree, "", {i, i});
  }
  CHECK(!tree.match_part("", kBegin, Tokens{0}) && tree.match_part("", kBegin, Tokens{1}));
  CHECK(tree.match("", kBegin, Tokens{0, 0}).size() == 1);
}

TEST(wrong_calls_throw_and_change_nothing) {
  BlockPool pool(3);
  CHECK_THROWS(PrefixTree(pool, 0), std::invalid_argument);
  PrefixTree tree(pool, 2);
  const Ids path = put(pool, tree, "", {1, 2});
  CHECK_THROWS(tree.insert("", kBegin, Tokens{}, 1), std::invalid_argument);
  CHECK_THROWS(tree.insert("", kBegin, Tokens{1, 2, 3}, 1), std::invalid_argument);
  CHECK_THROWS(tree.insert("", kBegin, Tokens{3, 4}, path[0]), std::invalid_argument);
  CHECK_THROWS(tree.insert("", kBegin, Tokens{3, 4}, 1), std::invalid_argument);  // nobody's
  CHECK_THROWS(tree.insert("", kBegin, Tokens{3, 4}, 3), std::out_of_range);
  CHECK_THROWS(tree.insert("", 3, Tokens{3, 4}, path[0]), std::out_of_range);
  CHECK_THROWS(tree.match("", -1, Tokens{3, 4}), std::out_of_range);
  CHECK_THROWS(tree.remove(3), std::out_of_range);
  CHECK(tree.num_blocks() == 1 && pool.num_free() == 2);
  tree.check_integrity();
}

// What the tree must know: the block of each prefix of full blocks, and of those that end in a tail.
using Key = std::pair<std::string, Tokens>;
using Model = std::map<Key, BlockId>;

void drop(Model& model, const Ids& removed) {
  const std::set<BlockId> ids(removed.begin(), removed.end());
  CHECK(ids.size() == removed.size());
  const std::size_t num_before = model.size();
  std::erase_if(model, [&](const auto& entry) { return ids.contains(entry.second); });
  CHECK(model.size() + ids.size() == num_before);
}

Ids expected_match(const Model& model, const Key& request, std::size_t block_size) {
  Ids path;
  for (std::size_t end = block_size; end <= request.second.size(); end += block_size) {
    const auto found = model.find({request.first, Tokens(request.second.begin(), request.second.begin() + end)});
    if (found == model.end()) {
      break;
    }
    path.push_back(found->second);
  }
  return path;
}

std::size_t num_alike(const Tokens& a, std::size_t begin, const Tokens& b) {
  std::size_t n = begin;
  for (; n < a.size() && n < b.size() && a[n] == b[n]; ++n) {
  }
  return n - begin;
}

class Walk {
 public:
  explicit Walk(unsigned seed)
      : rng_(seed),
        block_size_(1 + below(3)),
        pool_(static_cast<BlockId>(4 + below(40))),
        tree_(pool_, static_cast<std::int32_t>(block_size_)) {}

  void run() {
    for (int step = 0; step < 400; ++step) {
      const std::size_t action = below(8);
      if (action < 4) {
        arrive();
      } else if (action < 7 && !owned_.empty()) {
        leave();
      } else if (action == 7 && below(4) == 0 && !model_.empty()) {
        drop(model_, tree_.remove(std::next(model_.begin(), static_cast<long>(below(model_.size())))->second));
      } else {
        drop(model_, tree_.evict(static_cast<BlockId>(below(3))));
      }
      check();
    }
  }

 private:
  std::size_t below(std::size_t n) { return static_cast<std::size_t>(rng_() % n); }

  // A request with tokens of a small alphabet: it matches, then computes and inserts the rest.
  void arrive() {
    Key request{below(4) == 0 ? "salt" : "", Tokens(below(14))};
    std::ranges::generate(request.second, [&] { return static_cast<TokenId>(below(2)); });
    Ids path = tree_.match(request.first, kBegin, request.second);
    CHECK(path == expected_match(model_, request, block_size_));
    check_part(request, path);
    pool_.retain(path);
    while (path.size() * block_size_ < request.second.size() && compute(request, path)) {
    }
    owned_.push_back(std::move(path));
  }

  // Against all entries of the model, for the first tokens of the block that follows on the path.
  void check_part(const Key& request, const Ids& path) {
    const std::size_t begin = path.size() * block_size_, end = std::min(begin + block_size_, request.second.size());
    const Tokens looked_up(request.second.begin(), request.second.begin() + static_cast<long>(end));
    std::size_t best = 0;
    bool has_whole = false;
    for (const auto& [key, block] : model_) {
      const bool is_child = key.first == request.first && key.second.size() > begin &&
                            key.second.size() <= begin + block_size_ && num_alike(key.second, 0, looked_up) >= begin;
      const std::size_t n = is_child ? num_alike(key.second, begin, looked_up) : 0;
      const bool is_whole = key.second.size() == begin + n;
      has_whole = n > best ? is_whole : has_whole || (n == best && n > 0 && is_whole);
      best = std::max(best, n);
    }
    const auto after = path.empty() ? std::nullopt : std::optional(path.back());
    const auto part = tree_.match_part(request.first, after, std::span(looked_up).subspan(begin));
    CHECK(part.has_value() == (best > 0));
    if (part) {
      const auto found = std::ranges::find(model_, part->block, &Model::value_type::second);
      CHECK(static_cast<std::size_t>(part->num_tokens) == best && part->is_whole == has_whole);
      CHECK(num_alike(found->first.second, begin, looked_up) == best);
    }
  }

  bool compute(const Key& request, Ids& path) {
    drop(model_, tree_.evict(std::max(1 - pool_.num_free(), 0)));
    const auto block = pool_.allocate(1);
    if (!block) {
      return false;
    }
    const std::size_t start = path.size() * block_size_, end = std::min(start + block_size_, request.second.size());
    const auto after = path.empty() ? std::nullopt : std::optional(path.back());
    path.push_back(block->front());
    for (std::size_t stop = start + 1 + below(end - start);; stop = end) {  // all at once, or as a tail first
      const Tokens known(request.second.begin(), request.second.begin() + static_cast<long>(stop));
      insert({request.first, known}, after, start, path.back());
      if (stop == end) {
        return true;
      }
    }
  }

  void insert(const Key& key, std::optional<BlockId> after, std::size_t start, BlockId block) {
    const bool attached = !after || pool_.is_cached(*after);
    const auto inserted = tree_.insert(key.first, after, std::span(key.second).subspan(start), block);
    CHECK(inserted.has_value() == attached);
    if (inserted == block) {
      std::erase_if(model_, [&](const auto& entry) { return entry.second == block; });
      CHECK(model_.emplace(key, block).second);
    } else if (inserted) {  // another's tail
      CHECK(model_.at(key) == *inserted);
    }
  }

  void leave() {
    std::swap(owned_[below(owned_.size())], owned_.back());
    release(pool_, owned_.back(), std::string(1, static_cast<char>('a' + below(3))));
    owned_.pop_back();
  }

  void check() {
    pool_.check_integrity();
    tree_.check_integrity();
    std::vector<std::int32_t> num_owners(static_cast<std::size_t>(pool_.num_blocks()), 0);
    for (const Ids& path : owned_) {
      for (BlockId id : path) ++num_owners[id];
    }
    for (BlockId id = 0; id < pool_.num_blocks(); ++id) {
      CHECK(pool_.ref_count(id) == num_owners[id]);
    }
    CHECK(static_cast<std::size_t>(tree_.num_blocks()) == model_.size());
  }

  std::mt19937 rng_;
  std::size_t block_size_;
  BlockPool pool_;
  PrefixTree tree_;
  Model model_;
  std::vector<Ids> owned_;
};

TEST(knows_what_a_map_knows_on_random_walks) {
  for (unsigned seed = 0; seed < 60; ++seed) {
    Walk(seed).run();
  }
}

}  // namespace
