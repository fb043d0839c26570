#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "check.h"
#include "common/cpu_info.h"
#include "common/thread_pool.h"

namespace {

using mlx_server::ThreadPool;

// Every index once, and its write visible to the caller afterwards without atomics.
void check_loop(ThreadPool& pool, int count) {
  std::vector<int> calls(static_cast<std::size_t>(count), 0);
  pool.parallel_for(count, [&](int i) { ++calls[static_cast<std::size_t>(i)]; });
  CHECK(calls == std::vector<int>(static_cast<std::size_t>(count), 1));
}

TEST(calls_every_index_once) {
  for (const int num_threads : {1, 2, 5}) {
    ThreadPool pool(num_threads);
    CHECK_EQ(pool.num_threads(), num_threads);
    for (int repeat = 0; repeat < 2000; ++repeat) {
      check_loop(pool, repeat % 67);
    }
  }
}

TEST(sleeping_workers_wake) {
  ThreadPool pool(3);
  for (int repeat = 0; repeat < 5; ++repeat) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // longer than workers spin
    check_loop(pool, 100);
  }
}

TEST(workers_take_part) {
  ThreadPool pool(2);
  std::atomic<int> inside{0};
  // Each call waits until both threads are inside one.
  pool.parallel_for(2, [&](int) {
    ++inside;
    while (inside < 2) {
      std::this_thread::yield();
    }
  });
  CHECK_EQ(inside.load(), 2);
}

TEST(loops_inside_loops_run) {
  ThreadPool pool(3);
  std::atomic<int> calls{0};
  pool.parallel_for(10, [&](int) { pool.parallel_for(10, [&](int) { ++calls; }); });
  CHECK_EQ(calls.load(), 100);
}

TEST(several_threads_share_a_pool) {
  ThreadPool pool(3);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int repeat = 0; repeat < 500; ++repeat) {
        check_loop(pool, 23);
      }
    });
  }
  for (std::thread& caller : callers) {
    caller.join();
  }
}

TEST(idle_pools_end) {
  for (int repeat = 0; repeat < 100; ++repeat) {
    ThreadPool pool(4);
    if (repeat % 2) {
      check_loop(pool, 3);
    }
  }
}

TEST(shared_pool_has_a_thread_for_each_core) {
  CHECK_EQ(ThreadPool::shared().num_threads(), mlx_server::available_cores());
  check_loop(ThreadPool::shared(), 50);
}

}  // namespace
