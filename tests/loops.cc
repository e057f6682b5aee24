// parallel_for where memory runs out: prints which checks failed, and exits with their number.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <new>
#include <thread>
#include <vector>

#include "parallel.h"

namespace moejax {
std::atomic<int> worker_limit{0};
Notice& notice = *new Notice;
}  // namespace moejax

thread_local bool no_memory = false;

void* operator new(std::size_t size) {
  void* memory = no_memory ? nullptr : std::malloc(size);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

// Has memory for so many tasks, which begin at once or only after the loop.
struct Pool {
  int64_t room;
  bool at_once;
  std::vector<std::function<void()>> tasks = {};
  std::vector<std::thread> threads = {};

  int64_t num_threads() const { return 4; }

  void Schedule(std::function<void()> task) {
    if (room-- <= 0) throw std::bad_alloc();
    if (at_once) {
      threads.emplace_back(std::move(task));
    } else {
      tasks.push_back(std::move(task));
    }
  }

  void finish() {
    for (auto& task : tasks) task();
    for (auto& thread : threads) thread.join();
  }
};

// Whether every item was done once, within the loop.
bool whole(Pool pool, bool memory) {
  constexpr int64_t kCount = 64;
  std::atomic<int> done[kCount] = {};
  std::atomic<bool> over{false}, late{false};
  bool thrown = false;
  const auto body = [&](int64_t i) {
    std::this_thread::sleep_for(std::chrono::microseconds(20));
    if (over) late = true;
    ++done[i];
  };
  no_memory = !memory;
  try {
    moejax::parallel_for(pool, kCount, false, body);
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  no_memory = false;
  over = true;
  pool.finish();
  bool once = true;
  for (const auto& count : done) once = once && count == 1;
  return once && !late && !thrown;
}

int main() {
  int failed = 0;
  const auto check = [&](bool held, const char* what, int64_t room) {
    if (held) return;
    std::printf("%s, room for %d tasks\n", what, static_cast<int>(room));
    ++failed;
  };
  for (int64_t room = 0; room <= 3; ++room) {
    check(whole(Pool{room, true}, true), "tasks that begin at once", room);
    check(whole(Pool{room, false}, true), "tasks that begin late", room);
    check(whole(Pool{room, true}, false), "no memory for the loop", room);
  }
  return failed;
}
