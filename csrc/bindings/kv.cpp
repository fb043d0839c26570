#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"
#include "kv/block_pool.h"
#include "kv/prefix_tree.h"

namespace nb = nanobind;

namespace mlx_server {

using kv::BlockId;
using kv::BlockPool;
using kv::PrefixTree;
using kv::TokenId;

namespace {

void bind_block_pool(nb::module_& m) {
  nb::class_<BlockPool>(m, "BlockPool",
                        R"(Which of the KV cache's fixed-size blocks are free, and how many owners the others have.

Blocks 0 ... num_blocks - 1. An owner is whoever called `allocate` or `retain`. When its last owner releases a block it
is free again; or, if it is in a `PrefixTree`, idle: kept until it is evicted there. Calls that raise change nothing.
Not thread safe.)")
      .def(nb::init<BlockId>(), nb::arg("num_blocks"))
      .def("allocate", &BlockPool::allocate, nb::arg("n"),
           "n blocks with one owner each, or None if fewer than n are free. ValueError if n is negative.")
      .def(
          "retain", [](BlockPool& pool, const std::vector<BlockId>& ids) { pool.retain(ids); }, nb::arg("ids"),
          "One more owner for each id. IndexError for an id outside the pool, ValueError for a free block.")
      .def(
          "release",
          [](BlockPool& pool, const std::vector<BlockId>& ids, std::string_view client) { pool.release(ids, client); },
          nb::arg("ids"), nb::arg("client") = "",
          "One owner less for each id; of those that become idle, the last is the client's last to be evicted. "
          "IndexError for an id outside the pool, ValueError for a block without owner left.")
      .def("ref_count", &BlockPool::ref_count, nb::arg("id"), "Owners of a block, 0 if it is free or idle. IndexError.")
      .def("is_cached", &BlockPool::is_cached, nb::arg("id"), "Whether a block is in a tree. IndexError.")
      .def_prop_ro("num_blocks", &BlockPool::num_blocks)
      .def_prop_ro("num_free", &BlockPool::num_free)
      .def_prop_ro("num_idle", &BlockPool::num_idle, "Blocks without owner that a tree keeps.")
      .def("check_integrity", &BlockPool::check_integrity,
           "RuntimeError unless each block is either owned, or exactly once in the list of its state.");
}

void bind_prefix_tree(nb::module_& m) {
  nb::class_<PrefixTree>(m, "PrefixTree",
                         R"(Finds the blocks that already hold the KV of a request's first tokens.

A radix tree over token ids whose every edge is one block, full but at the ends of requests. Paths of different salts
have nothing in common. Tokens are compared, not only their hashes. The tree owns no block: whoever uses one retains it.
Not thread safe.)")
      .def(nb::init<BlockPool&, std::int32_t>(), nb::arg("pool"), nb::arg("block_size"), nb::keep_alive<1, 2>())
      .def(
          "match",
          [](const PrefixTree& tree, std::string_view salt, std::optional<BlockId> after,
             const std::vector<TokenId>& tokens) { return tree.match(salt, after, tokens); },
          nb::arg("salt"), nb::arg("after").none(), nb::arg("tokens"),
          "The blocks that hold `tokens`, as many in a row as there are, full ones only; `after` is the block of the "
          "tokens before, None where a request begins. IndexError if `after` is outside the pool.")
      .def(
          "match_part",
          [](const PrefixTree& tree, std::string_view salt, std::optional<BlockId> after,
             const std::vector<TokenId>& tokens) {
            const auto part = tree.match_part(salt, after, tokens);
            return part ? std::optional(std::make_tuple(part->block, part->num_tokens, part->is_whole)) : std::nullopt;
          },
          nb::arg("salt"), nb::arg("after").none(), nb::arg("tokens"),
          "Of the blocks that follow on `after`, of which the newest 32 are looked at, the one that begins with most "
          "of `tokens`; how many these are; whether they are all that it holds. None: there is none. IndexError.")
      .def(
          "insert",
          [](PrefixTree& tree, std::string_view salt, std::optional<BlockId> after, const std::vector<TokenId>& tokens,
             BlockId block) { return tree.insert(salt, after, tokens, block); },
          nb::arg("salt"), nb::arg("after").none(), nb::arg("tokens"), nb::arg("block"),
          "Lets others find an owned block, which holds the `tokens` that follow on `after`: block_size, or fewer if "
          "it is the unfinished end of a request, which may be inserted again with more. The tree's block for these "
          "tokens: `block` or one that was there before; None if `after` has left the tree. ValueError for another "
          "number of tokens, a block that nobody owns or that holds other tokens in the tree.")
      .def("evict", &PrefixTree::evict, nb::arg("n"),
           "Takes idle blocks out, and what follows on them, until n more are free or none is idle: first the one that "
           "was "
           "released longest ago of the client with the most. The blocks that left the tree.")
      .def("remove", &PrefixTree::remove, nb::arg("block"),
           "Takes a block out, and what follows on it; the blocks that left the tree. IndexError.")
      .def("clear", &PrefixTree::clear, "Takes all blocks out.")
      .def_prop_ro("num_blocks", &PrefixTree::num_blocks)
      .def("check_integrity", &PrefixTree::check_integrity,
           "RuntimeError unless each block of the tree can be found by its tokens, and no other block is cached.");
}

}  // namespace

void bind_kv(nb::module_& m) {
  bind_block_pool(m);
  bind_prefix_tree(m);
}

}  // namespace mlx_server
