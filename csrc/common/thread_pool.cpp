#include "common/thread_pool.h"

#include "common/cpu_info.h"

namespace mlx_server {

namespace {

constexpr int kSpinsBeforeSleep = 4000;
constexpr int kSpinsBetweenYields = 64;

// One turn of a waiting loop. Yielding now and then lets a thread with real work have the core when there are too few.
void wait_a_little(int spin) {
  if (spin % kSpinsBetweenYields == kSpinsBetweenYields - 1) {
    std::this_thread::yield();
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  for (int i = 1; i < num_threads; ++i) {
    workers_.emplace_back([this] { worker_loop(); });
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(sleep_mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) {
    worker.join();
  }
}

ThreadPool& ThreadPool::shared() {
  static ThreadPool* const pool = new ThreadPool(available_cores());
  return *pool;
}

void ThreadPool::run(int count, Task task, const void* context) {
  if (count <= 1 || workers_.empty() || busy_.test_and_set(std::memory_order_acquire)) {
    for (int i = 0; i < count; ++i) {
      task(context, i);
    }
    return;
  }
  task_ = task;
  context_ = context;
  count_ = count;
  next_.store(0, std::memory_order_relaxed);
  state_.fetch_add(kOneJob + kOpen);
  if (num_asleep_.load() > 0) {
    // A worker between its last look at state_ and its sleep holds the mutex: after this it is asleep or has seen the
    // job.
    {
      const std::lock_guard lock(sleep_mutex_);
    }
    wake_.notify_all();
  }
  work();
  state_.fetch_sub(kOpen);
  for (int spin = 0; workers_inside(state_.load(std::memory_order_acquire)) != 0; ++spin) {
    wait_a_little(spin);
  }
  busy_.clear(std::memory_order_release);
}

void ThreadPool::work() {
  for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
    task_(context_, i);
  }
}

void ThreadPool::worker_loop() {
  std::uint64_t last_job = 0;
  int spin = 0;
  while (!stop_.load(std::memory_order_relaxed)) {
    if (is_new(state_.load(std::memory_order_relaxed), last_job)) {
      const std::uint64_t state = state_.fetch_add(kOneWorker, std::memory_order_acquire);
      if (state & kOpen) {
        last_job = job(state);
        work();
      }
      state_.fetch_sub(kOneWorker, std::memory_order_release);
      spin = 0;
    } else if (++spin < kSpinsBeforeSleep) {
      wait_a_little(spin);
    } else {
      sleep(last_job);
      spin = 0;
    }
  }
}

void ThreadPool::sleep(std::uint64_t last_job) {
  std::unique_lock lock(sleep_mutex_);
  ++num_asleep_;
  wake_.wait(lock, [&] { return stop_ || is_new(state_.load(), last_job); });
  --num_asleep_;
}

}  // namespace mlx_server
