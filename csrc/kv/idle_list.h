// The order in which cached blocks that nobody owns are given up.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace mlx_server::kv {

using BlockId = std::int32_t;

// Each block belongs to the client that used it last. The next one to go is the one that was added longest ago of the
// client that has the most: a client that floods the cache drives out its own blocks, once it has more than others.
//
// Each call costs O(log clients). Not thread safe.
class IdleList {
 public:
  explicit IdleList(BlockId num_blocks) : places_(static_cast<std::size_t>(num_blocks)) {}

  // A block that is not in the list.
  void append(BlockId id, std::string_view client);
  // A block that is in the list.
  void remove(BlockId id);

  std::optional<BlockId> next() const;
  BlockId size() const { return size_; }

  // Whether each block is in the list, [num_blocks]. Throws std::logic_error unless it is in it at most once.
  std::vector<bool> check_integrity() const;

 private:
  using Share = std::pair<const std::string, std::list<BlockId>>;  // client, blocks: the oldest first, never none

  struct Place {
    Share* share = nullptr;  // null: not in the list
    std::list<BlockId>::iterator position;
  };

  std::unordered_map<std::string, std::list<BlockId>> shares_;
  std::set<std::pair<std::size_t, std::string>> sizes_;  // (blocks, client)
  std::vector<Place> places_;                            // [num_blocks]
  BlockId size_ = 0;
};

}  // namespace mlx_server::kv
