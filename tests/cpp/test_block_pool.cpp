#include "kv/block_pool.h"

#include <random>
#include <stdexcept>
#include <vector>

#include "check.h"

namespace {

using mlx_server::kv::BlockId;
using mlx_server::kv::BlockPool;
using Ids = std::vector<BlockId>;

TEST(allocates_all_or_nothing) {
  BlockPool pool(4);
  CHECK(pool.allocate(3) == (Ids{0, 1, 2}));
  CHECK(!pool.allocate(2).has_value());
  CHECK(pool.num_free() == 1);
  CHECK(pool.allocate(0) == Ids{});
  CHECK(pool.allocate(1) == Ids{3});
  CHECK(!pool.allocate(1).has_value());
}

TEST(reuses_the_block_freed_last) {
  BlockPool pool(4);
  pool.allocate(4);
  pool.release(Ids{2, 0});
  CHECK(pool.allocate(2) == (Ids{0, 2}));
}

TEST(shared_block_outlives_its_first_owner) {
  BlockPool pool(2);
  const Ids ids = *pool.allocate(1);
  pool.retain(ids);
  pool.release(ids);
  CHECK(pool.num_free() == 1 && pool.ref_count(ids[0]) == 1);
  pool.release(ids);
  CHECK(pool.num_free() == 2 && pool.ref_count(ids[0]) == 0);
}

TEST(cached_blocks_are_idle_when_nobody_owns_them) {
  BlockPool pool(4);
  pool.allocate(4);
  pool.cache(1);
  pool.cache(2);
  pool.cache(3);
  pool.release(Ids{3, 0, 1, 2});
  CHECK(pool.num_free() == 1 && pool.num_idle() == 3 && pool.next_idle() == 3);
  CHECK(!pool.allocate(2));
  pool.retain(Ids{3, 3});
  CHECK(pool.ref_count(3) == 2 && pool.num_idle() == 2 && pool.next_idle() == 1);
  pool.uncache(1);
  CHECK(pool.num_free() == 2 && pool.next_idle() == 2);
  pool.uncache(3);
  pool.release(Ids{3, 3});
  CHECK(pool.num_free() == 3 && !pool.is_cached(3) && pool.is_cached(2));
  pool.check_integrity();
}

TEST(the_client_with_the_most_idle_blocks_gives_one_up) {
  BlockPool pool(6);
  const Ids ids = *pool.allocate(6);
  for (BlockId id : ids) {
    pool.cache(id);
  }
  pool.release(Ids{0}, "quiet");
  pool.release(Ids{1, 2, 3}, "flood");
  for (BlockId expected : {1, 2}) {
    CHECK(pool.next_idle() == expected);
    pool.uncache(expected);
  }
  pool.release(Ids{4}, "quiet");
  CHECK(pool.next_idle() == 0);
  pool.check_integrity();
  pool.retain(Ids{0, 3, 4});
  CHECK(!pool.next_idle());
  pool.release(Ids{0, 3, 4}, "third");
  CHECK(pool.next_idle() == 0 && pool.num_idle() == 3);
  pool.check_integrity();
}

TEST(wrong_calls_throw_and_change_nothing) {
  CHECK_THROWS(BlockPool(-1), std::invalid_argument);
  BlockPool pool(4);
  pool.allocate(2);
  CHECK_THROWS(pool.allocate(-1), std::invalid_argument);
  CHECK_THROWS(pool.ref_count(4), std::out_of_range);
  CHECK_THROWS(pool.retain(Ids{0, 4}), std::out_of_range);
  CHECK_THROWS(pool.retain(Ids{0, 3}), std::invalid_argument);
  CHECK_THROWS(pool.release(Ids{0, -1}), std::out_of_range);
  CHECK_THROWS(pool.release(Ids{0, 3}), std::invalid_argument);
  CHECK_THROWS(pool.release(Ids{1, 0, 1}), std::invalid_argument);
  CHECK_THROWS(pool.cache(3), std::invalid_argument);
  CHECK_THROWS(pool.cache(-1), std::out_of_range);
  CHECK_THROWS(pool.uncache(4), std::out_of_range);
  CHECK_THROWS(pool.is_cached(4), std::out_of_range);
  CHECK(pool.ref_count(0) == 1 && pool.ref_count(1) == 1 && pool.num_free() == 2);
  pool.check_integrity();
}

// Requests come, share blocks of others and go, in an order that the seed gives.
void random_walk(unsigned seed) {
  std::mt19937 rng(seed);
  auto below = [&rng](std::size_t n) { return static_cast<std::size_t>(rng() % n); };
  BlockPool pool(static_cast<BlockId>(1 + below(40)));
  std::vector<Ids> owners;
  std::vector<std::int32_t> expected(static_cast<std::size_t>(pool.num_blocks()), 0);

  for (int step = 0; step < 500; ++step) {
    const std::size_t action = below(3);
    if (action == 0 || owners.empty()) {
      const auto n = static_cast<BlockId>(below(8));
      const BlockId num_free = pool.num_free();
      const auto ids = pool.allocate(n);
      CHECK(ids.has_value() == (n <= num_free));
      for (BlockId id : ids.value_or(Ids{})) {
        CHECK(expected[id]++ == 0);
      }
      owners.push_back(ids.value_or(Ids{}));
    } else if (action == 1) {
      Ids shared = owners[below(owners.size())];
      shared.resize(below(shared.size() + 1));
      pool.retain(shared);
      for (BlockId id : shared) {
        ++expected[id];
      }
      owners.push_back(std::move(shared));
    } else {
      std::swap(owners[below(owners.size())], owners.back());
      pool.release(owners.back());
      for (BlockId id : owners.back()) {
        --expected[id];
      }
      owners.pop_back();
    }
    pool.check_integrity();
    for (BlockId id = 0; id < pool.num_blocks(); ++id) {
      CHECK(pool.ref_count(id) == expected[id]);
    }
  }
  for (const Ids& ids : owners) {
    pool.release(ids);
  }
  pool.check_integrity();
  CHECK(pool.num_free() == pool.num_blocks());
}

TEST(bookkeeping_stays_whole_on_random_walks) {
  for (unsigned seed = 0; seed < 50; ++seed) {
    random_walk(seed);
  }
}

}  // namespace
