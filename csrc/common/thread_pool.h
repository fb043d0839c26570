// A persistent pool for short parallel loops: a decode step runs hundreds of them, each a few microseconds long.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace mlx_server {

// Workers spin for a moment after a loop, so that the next one starts at once, then sleep. The caller takes part in its
// own loop and never waits for a worker that has not begun: a sleeping or preempted worker delays nobody.
class ThreadPool {
 public:
  // num_threads counts the caller; 1 means that every loop runs on the caller alone.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // The process's pool, one thread for each available core. Never destroyed: ops may still run while the process exits.
  static ThreadPool& shared();

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(i) once for each i in [0, count), in any order and on any thread of the pool, and returns when all calls
  // have returned. body must not throw. Loops started while another one runs (from its body, or from another thread)
  // run on their caller alone.
  template <typename Body>
  void parallel_for(int count, const Body& body) {
    run(count, [](const void* context, int index) { (*static_cast<const Body*>(context))(index); }, &body);
  }

 private:
  using Task = void (*)(const void* context, int index);

  void run(int count, Task task, const void* context);
  void work();
  void worker_loop();
  void sleep(std::uint64_t last_job);

  // One word says which job is published, whether it is open, and how many workers are inside: a worker that enters
  // learns in the same atomic step whether it may.
  static constexpr std::uint64_t kOneWorker = 1;
  static constexpr std::uint64_t kOpen = std::uint64_t{1} << 32;
  static constexpr std::uint64_t kOneJob = std::uint64_t{1} << 33;
  static std::uint64_t workers_inside(std::uint64_t state) { return state & (kOpen - 1); }
  static std::uint64_t job(std::uint64_t state) { return state / kOneJob; }
  static bool is_new(std::uint64_t state, std::uint64_t last_job) { return (state & kOpen) && job(state) != last_job; }

  std::atomic_flag busy_;  // set while a caller's job is published
  Task task_ = nullptr;
  const void* context_ = nullptr;
  int count_ = 0;
  alignas(64) std::atomic<int> next_{0};
  alignas(64) std::atomic<std::uint64_t> state_{0};

  alignas(64) std::mutex sleep_mutex_;
  std::condition_variable wake_;
  std::atomic<int> num_asleep_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace mlx_server
