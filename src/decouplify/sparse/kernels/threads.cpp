// A pool of workers for one parallel loop at a time. A second caller does its loop alone meanwhile, so concurrent runs
// never wait for each other.
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "layout.h"

namespace decouplify {

namespace {

#if defined(__x86_64__)
void relax() { __builtin_ia32_pause(); }
#elif defined(__aarch64__)
void relax() { asm volatile("yield"); }
#else
void relax() {}
#endif

// The next loop of a network follows within microseconds; sleeping in between would cost more than the loop.
constexpr int kSpins = 4000;

struct Loop {
  Body body;
  void* context;
  int n_tasks, n_threads;

  void run(int thread) const {
    const auto edge = [this](int i) { return static_cast<int>(int64_t{n_tasks} * i / n_threads); };
    if (edge(thread) < edge(thread + 1)) body(context, edge(thread), edge(thread + 1), thread);
  }
};

class Pool {
 public:
  // Whether the loop was done; false if the pool serves another caller.
  bool run(const Loop& loop) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    grow(loop.n_threads - 1);
    loop_ = loop;
    n_running_.store(loop.n_threads - 1, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      // Only workers that take part hear of the loop: a late one could otherwise read the next loop twice.
      for (int thread = 1; thread < loop.n_threads; ++thread) posted_[thread].fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    loop.run(0);
    for (int i = 0; n_running_.load(std::memory_order_acquire) > 0; ++i) {
      // The worker may be waiting for this very core.
      i < kSpins ? relax() : std::this_thread::yield();
    }
    return true;
  }

 private:
  void grow(int n_workers) {
    for (; n_workers_ < n_workers; ++n_workers_) std::thread(&Pool::work, this, n_workers_ + 1).detach();
  }

  void work(int thread) {
    for (uint64_t seen = 0;;) {
      seen = wait(posted_[thread], seen);
      loop_.run(thread);
      n_running_.fetch_sub(1, std::memory_order_release);
    }
  }

  uint64_t wait(const std::atomic<uint64_t>& posted, uint64_t seen) {
    for (int i = 0; i < kSpins; ++i) {
      if (posted.load(std::memory_order_acquire) != seen) return seen + 1;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return posted.load(std::memory_order_acquire) != seen; });
    return seen + 1;
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> posted_[Scratch::kMaxThreads] = {};  // loops each worker was called to
  std::atomic<int> n_running_{0};
  int n_workers_ = 0;
  Loop loop_{};
};

std::atomic<Pool*> pool{nullptr};

// Threads do not survive a fork; the child starts a pool of its own and leaves the parent's memory alone.
void forget_pool() { pool.store(nullptr); }

Pool& get_pool() {
  static const bool registered [[maybe_unused]] = pthread_atfork(nullptr, nullptr, forget_pool) == 0;
  Pool* current = pool.load();
  if (current == nullptr) {
    // Never deleted: detached workers may outlive every static object.
    auto* fresh = new Pool;
    if (pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
  }
  return *current;
}

}  // namespace

void run_parallel(int n_threads, int n_tasks, Body body, void* context) {
  const int limit = n_threads < Scratch::kMaxThreads ? n_threads : Scratch::kMaxThreads;
  const Loop loop{body, context, n_tasks, limit < n_tasks ? limit : n_tasks};
  if (n_tasks <= 0) return;
  if (loop.n_threads > 1 && get_pool().run(loop)) return;
  for (int thread = 0; thread < loop.n_threads; ++thread) loop.run(thread);
}

}  // namespace decouplify
