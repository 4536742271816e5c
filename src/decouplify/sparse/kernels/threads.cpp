// A pool of workers for one parallel loop at a time. A second caller does its loop alone meanwhile, so concurrent runs
// never wait for each other.
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
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

int most_threads(int asked) { return asked < Scratch::kMaxThreads ? asked : Scratch::kMaxThreads; }

struct Loop {
  Body body;
  void* context;
  int n_tasks, n_threads, n_shares;
  uint64_t number;

  void run(int share, int thread, bool is_first) const {
    const auto edge = [this](int i) { return static_cast<int>(int64_t{n_tasks} * i / n_shares); };
    body(context, {edge(share), edge(share + 1), thread, share, is_first});
  }
};

// Where a loop stands, in one word, which workers join and leave with one instruction.
class State {
 public:
  static constexpr uint64_t kOne = 1, kRunning = 0xff, kOpen = 1 << 8;

  explicit State(uint64_t word) : word_(word) {}
  static uint64_t opened(const Loop& loop) { return loop.number << 32 | uint64_t(loop.n_threads) << 16 | kOpen; }

  uint32_t number() const { return word_ >> 32; }
  bool takes(int thread) const { return (word_ & kOpen) != 0 && thread < static_cast<int>(word_ >> 16 & 0xff); }
  int n_running() const { return word_ & kRunning; }

 private:
  uint64_t word_;
};

// Threads take a loop's shares as they come to them: a core that others use as well, or that waits for memory, does
// less, and one that is asleep nothing.
class Pool {
 public:
  // Whether the loop was done; false if the pool serves another caller.
  bool run(Loop loop) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return false;
    grow(loop.n_threads - 1);
    loop.number = ++n_loops_;
    loop_ = loop;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      state_.store(State::opened(loop), std::memory_order_release);
    }
    wake_.notify_all();
    take_shares(0);
    state_.fetch_and(~State::kOpen, std::memory_order_acq_rel);
    for (int i = 0; State(state_.load(std::memory_order_acquire)).n_running() > 0; ++i) {
      // The worker may be waiting for this very core.
      i < kSpins ? relax() : std::this_thread::yield();
    }
    if (has_no_memory_.exchange(false, std::memory_order_acq_rel)) throw std::bad_alloc();
    return true;
  }

 private:
  // Where the system gives no more threads, those that there are take all shares.
  void grow(int n_workers) try {
    for (; n_workers_ < n_workers; ++n_workers_) std::thread(&Pool::work, this, n_workers_ + 1).detach();
  } catch (const std::system_error&) {
  }

  void work(int thread) {
    for (uint32_t seen = 0;;) {
      seen = wait(seen);
      if (!join(thread, seen)) continue;
      take_shares(thread);
      state_.fetch_sub(State::kOne, std::memory_order_release);
    }
  }

  // The number of a loop that is not the one seen last.
  uint32_t wait(uint32_t seen) {
    const auto number = [this] { return State(state_.load(std::memory_order_acquire)).number(); };
    for (int i = 0; i < kSpins; ++i) {
      if (const uint32_t found = number(); found != seen) return found;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return number() != seen; });
    return number();
  }

  // Whether this worker takes part; the loop stays as it is until it leaves.
  bool join(int thread, uint32_t number) {
    uint64_t word = state_.load(std::memory_order_acquire);
    while (State(word).number() == number && State(word).takes(thread)) {
      if (state_.compare_exchange_weak(word, word + State::kOne, std::memory_order_acq_rel)) return true;
    }
    return false;
  }

  // First those near to what this thread did in the loop before, then what others have left, from the far end.
  void take_shares(int thread) {
    const Loop& loop = loop_;
    const auto first = [&](int of) { return loop.n_shares * of / loop.n_threads; };
    int n_taken = 0;
    const auto take = [&](int share) {
      if (taken_[share].exchange(loop.number, std::memory_order_acq_rel) == loop.number) return;
      try {
        loop.run(share, thread, n_taken++ == 0);
      } catch (const std::bad_alloc&) {
        has_no_memory_.store(true, std::memory_order_release);  // for the caller, once nobody is at work any more
      }
    };
    for (int share = first(thread); share < first(thread + 1); ++share) take(share);
    for (int i = 1; i < loop.n_threads; ++i) {
      const int other = (thread + i) % loop.n_threads;
      for (int share = first(other + 1) - 1; share >= first(other); --share) take(share);
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> state_{0};
  std::atomic<bool> has_no_memory_{false};
  std::atomic<uint64_t> taken_[kSharesPerThread * Scratch::kMaxThreads] = {};  // per share, the last loop that had it
  uint64_t n_loops_ = 0;
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

int n_shares(int n_threads, int n_tasks) {
  const int most = n_threads <= 1 ? 1 : kSharesPerThread * most_threads(n_threads);
  return n_tasks < most ? n_tasks : most;
}

void run_parallel(int n_threads, int n_tasks, Body body, void* context) {
  if (n_tasks <= 0) return;
  const int n_shares = decouplify::n_shares(n_threads, n_tasks);
  const int limit = most_threads(n_threads);
  const Loop loop{body, context, n_tasks, limit < n_shares ? limit : n_shares, n_shares, 0};
  if (loop.n_threads > 1 && get_pool().run(loop)) return;
  for (int share = 0; share < n_shares; ++share) loop.run(share, 0, share == 0);
}

}  // namespace decouplify
