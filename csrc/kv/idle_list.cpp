#include "kv/idle_list.h"

#include <stdexcept>

namespace mlx_server::kv {

void IdleList::append(BlockId id, std::string_view client) {
  Share& share = *shares_.try_emplace(std::string(client)).first;
  auto& [name, blocks] = share;
  sizes_.erase({blocks.size(), name});
  blocks.push_back(id);
  sizes_.emplace(blocks.size(), name);
  places_[id] = {&share, std::prev(blocks.end())};
  ++size_;
}

void IdleList::remove(BlockId id) {
  auto& [name, blocks] = *places_[id].share;
  sizes_.erase({blocks.size(), name});
  blocks.erase(places_[id].position);
  if (blocks.empty()) {
    shares_.erase(shares_.find(name));
  } else {
    sizes_.emplace(blocks.size(), name);
  }
  places_[id].share = nullptr;
  --size_;
}

std::optional<BlockId> IdleList::next() const {
  return sizes_.empty() ? std::nullopt : std::optional(shares_.at(sizes_.rbegin()->second).front());
}

std::vector<bool> IdleList::check_integrity() const {
  std::vector<bool> listed(places_.size(), false);
  std::size_t num_listed = 0;
  for (const Share& share : shares_) {
    num_listed += share.second.size();
    for (auto block = share.second.begin(); block != share.second.end(); ++block) {
      if (places_[*block].share != &share || places_[*block].position != block) {
        throw std::logic_error("[IdleList] block " + std::to_string(*block) + " is not where it should be.");
      }
      listed[*block] = true;
    }
    if (!sizes_.contains({share.second.size(), share.first})) {
      throw std::logic_error("[IdleList] the blocks of a client are not counted.");
    }
  }
  std::size_t num_placed = 0;
  for (const Place& place : places_) {
    num_placed += place.share != nullptr;
  }
  if (num_placed != num_listed || static_cast<std::size_t>(size_) != num_listed || sizes_.size() != shares_.size()) {
    throw std::logic_error("[IdleList] " + std::to_string(num_listed) + " blocks are counted as " +
                           std::to_string(size_) + ".");
  }
  return listed;
}

}  // namespace mlx_server::kv
