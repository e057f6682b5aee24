// Threads of the library's own, for work that XLA has no pool for: what a GPU's stream asks of the
// host. They have the interface of xla::ffi::ThreadPool that parallel_for uses.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace moejax {

class Threads {
 public:
  // Begun when first asked for, one for every other processor; never destroyed, since they may
  // outlive main.
  static Threads& shared() {
    static Threads& threads = *new Threads;
    return threads;
  }

  // The caller included.
  int64_t num_threads() const { return count_; }

  void Schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    ready_.notify_one();
  }

 private:
  Threads() {
    const int64_t most = std::max<int64_t>(1, std::thread::hardware_concurrency());
    try {
      for (; count_ < most; ++count_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {  // a limit of the system: those that began will do
    }
  }

  void serve() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      ready_.wait(lock, [this] { return !tasks_.empty(); });
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::function<void()>> tasks_;
  int64_t count_ = 1;
};

}  // namespace moejax
