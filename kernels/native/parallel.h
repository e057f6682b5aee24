// Loops over the threads of a pool, such as XLA's own intra-op threads.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moejax {

// XLA's pool threads flush denormals and its callers need not: results must not depend on the
// thread, so every thread computes in IEEE arithmetic while this object lives.
class FloatMode {
 public:
#if defined(__x86_64__)
  FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~FloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
  }
  ~FloatMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

extern std::atomic<int> worker_limit;  // 0 = as many as the pool has (dispatch.cc)

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Shared with tasks that may start after the loop is over: they find nothing to claim and leave
// without touching the body, so nobody ever waits for a task that did not start.
struct Loop {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  int64_t count = 0;
  void (*call)(const void* body, int64_t i) = nullptr;
  const void* body = nullptr;

  void work() {
    int64_t i = next.fetch_add(1, std::memory_order_relaxed);
    if (i >= count) return;
    FloatMode mode;
    for (; i < count; i = next.fetch_add(1, std::memory_order_relaxed)) {
      call(body, i);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

// Where the newest loop is announced to workers that linger. A sleeping thread takes longer to wake
// than a small matrix to read, so a worker that has run out of work watches for a while.
class Notice {
 public:
  // How many workers watch for this loop.
  int64_t publish(const std::shared_ptr<Loop>& loop) {
    lock();
    loop_ = loop;
    epoch_.fetch_add(1, std::memory_order_release);
    unlock();
    return watching_.load(std::memory_order_relaxed);
  }

  // Works on announced loops until none has come for a while, or the pool has waited long enough.
  void linger() {
    uint64_t seen = epoch_.load(std::memory_order_acquire);
    watching_.fetch_add(1, std::memory_order_relaxed);
    const auto last = Clock::now() + kLongest;
    auto deadline = Clock::now() + kLinger;
    for (int spins = 0;; ++spins) {
      const uint64_t now = epoch_.load(std::memory_order_acquire);
      if (now != seen) {
        seen = now;
        lock();
        std::shared_ptr<Loop> loop = loop_;
        unlock();
        if (loop) loop->work();
        const auto time = Clock::now();
        if (time > last) break;
        deadline = time + kLinger;
      } else if (spins % 64 == 0 && Clock::now() > deadline) {
        break;
      }
      pause();
    }
    watching_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::microseconds kLinger{100}, kLongest{5000};

  void lock() {
    while (locked_.test_and_set(std::memory_order_acquire)) pause();
  }
  void unlock() { locked_.clear(std::memory_order_release); }

  std::atomic<uint64_t> epoch_{0};
  std::atomic<int64_t> watching_{0};
  std::atomic_flag locked_ = ATOMIC_FLAG_INIT;
  std::shared_ptr<Loop> loop_;
};

extern Notice& notice;  // dispatch.cc

// body(i) for i in [0, count), in any order, on the caller and up to `pool`'s other threads: fewer
// where there is no memory to ask them. Returns when all is done; body must not throw.
template <class Pool, class Body>
void parallel_for(Pool& pool, int64_t count, bool small, const Body& body) {
  auto call = +[](const void* b, int64_t i) { (*static_cast<const Body*>(b))(i); };
  int64_t workers = 1;
  if (!small && count > 1) {
    workers = pool.num_threads();
    const int limit = worker_limit.load(std::memory_order_relaxed);
    if (limit > 0 && limit < workers) workers = limit;
    if (workers > count) workers = count;
  }
  std::shared_ptr<Loop> loop;
  if (workers > 1) {
    try {
      loop = std::make_shared<Loop>();
    } catch (const std::bad_alloc&) {  // the caller does it alone
    }
  }
  if (!loop) {
    FloatMode mode;
    for (int64_t i = 0; i < count; ++i) call(&body, i);
    return;
  }
  loop->count = count;
  loop->call = call;
  loop->body = &body;
  try {
    for (int64_t w = 1 + notice.publish(loop); w < workers; ++w) {
      pool.Schedule([loop] {
        loop->work();
        notice.linger();
      });
    }
  } catch (const std::exception&) {  // those that were asked share the rest with the caller
  }
  loop->work();
  for (int spins = 0; loop->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins < 4096) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace moejax
