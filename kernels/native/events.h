// What a store has moved and the host computed, one by one: a bounded log, off until asked for.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace moejax {

constexpr int32_t kHostEvent = 2;  // of an event; below that it is the `Kind` of a read

// Times in ns of `clock_ns`; mirrored by `EVENT` in store.py.
struct Event {
  int64_t requested;
  int64_t begun;
  int64_t landed;
  int32_t expert;  // -1 = unknown
  int32_t kind;
};

// A ring: what comes after it is full takes the place of the oldest. Not thread-safe.
class EventLog {
 public:
  bool on() const { return capacity_ > 0; }
  int64_t size() const { return static_cast<int64_t>(ring_.size()); }
  int64_t dropped() const { return dropped_; }

  // Starts anew at a time; capacity 0 = off. Takes all its memory here.
  void start(int64_t capacity, int64_t now) {
    std::vector<Event> ring;
    ring.reserve(capacity);
    ring_.swap(ring);
    capacity_ = capacity;
    since_ = now;
    first_ = dropped_ = 0;
  }

  // What was asked for before the log began counts as asked for then.
  void add(Event event) {
    event.requested = std::max(event.requested, since_);
    event.begun = std::max(event.begun, since_);
    if (size() < capacity_) {
      ring_.push_back(event);
      return;
    }
    ring_[first_] = event;
    first_ = (first_ + 1) % capacity_;
    ++dropped_;
  }

  // Forgets the oldest `count` and what was dropped, and goes on.
  void forget(int64_t count) {
    std::rotate(ring_.begin(), ring_.begin() + first_, ring_.end());
    ring_.erase(ring_.begin(), ring_.begin() + count);
    first_ = dropped_ = 0;
  }

  // Copies up to `count` events, the oldest first; how many.
  int64_t copy(Event* to, int64_t count) const {
    count = std::min(count, size());
    for (int64_t i = 0; i < count; ++i) to[i] = ring_[(first_ + i) % size()];
    return count;
  }

 private:
  std::vector<Event> ring_;
  int64_t capacity_ = 0;
  int64_t since_ = 0;    // ns
  int64_t first_ = 0;    // index of the oldest
  int64_t dropped_ = 0;  // overwritten since the start
};

}  // namespace moejax
