// Loops over XLA's own intra-op threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

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

// body(i) for i in [0, count), in any order, on the caller and up to `pool`'s other threads.
template <class Body>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, bool small, const Body& body) {
  auto call = +[](const void* b, int64_t i) { (*static_cast<const Body*>(b))(i); };
  int64_t workers = 1;
  if (!small && count > 1) {
    workers = pool.num_threads();
    const int limit = worker_limit.load(std::memory_order_relaxed);
    if (limit > 0 && limit < workers) workers = limit;
    if (workers > count) workers = count;
  }
  if (workers <= 1) {
    FloatMode mode;
    for (int64_t i = 0; i < count; ++i) call(&body, i);
    return;
  }
  auto loop = std::make_shared<Loop>();
  loop->count = count;
  loop->call = call;
  loop->body = &body;
  for (int64_t w = 1; w < workers; ++w) pool.Schedule([loop] { loop->work(); });
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
