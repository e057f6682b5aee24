// Records in memory behind a link of a stated rate and latency.
#include <algorithm>
#include <chrono>
#include <deque>
#include <thread>

#include "store.h"

namespace moejax {
namespace {

constexpr double kLongestNs = 1e18;  // of a transfer: times must not overflow
constexpr int64_t kSpinNs = 50'000;  // a sleeping thread wakes up to this much late

void sleep_until(int64_t time) {
  const int64_t left = time - clock_ns() - kSpinNs;
  if (left > 0) std::this_thread::sleep_for(std::chrono::nanoseconds(left));
  while (clock_ns() < time) {
  }
}

// Records in memory that arrive as over a serial link of a given rate. Nothing moves before a
// commit copies it: the link is a calculation, brought up to date whenever it is used, so it costs
// no thread and its times do not depend on when a thread wakes.
class PacedStore final : public Store {
 public:
  PacedStore(const char* base, int64_t record_bytes, int32_t records, int32_t buffers,
             double gigabytes_per_second, double latency_us)
      : Store(record_bytes, records, buffers),
        base_(base),
        transfer_ns_(static_cast<int64_t>(
            std::min(kLongestNs, latency_us * 1e3 + record_bytes / gigabytes_per_second))) {}
  CommitResult commit(const std::vector<Placement>& placements, const Copier& copy) override;

 private:
  struct Transfer {
    int64_t requested;
    int64_t done = 0;  // ns; 0 = not begun
  };
  void advance() override;
  void wake() override { advance(); }
  int64_t begin(int64_t requested);

  const char* const base_;
  const int64_t transfer_ns_;
  int64_t free_ = 0;                // ns; when the link has done what it has begun
  std::deque<Transfer*> demanded_;  // by waiting commits, without a landing buffer
};

int64_t PacedStore::begin(int64_t requested) {
  free_ = std::max(free_, requested) + transfer_ns_;
  stats_.busy_us += transfer_ns_ / 1000;
  ++stats_.landed;
  stats_.bytes += record_bytes_;
  return free_;
}

// Begins, in order of urgency, what the link has had time to begin.
void PacedStore::advance() {
  const int64_t now = clock_ns();
  while (free_ <= now) {
    if (!demanded_.empty()) {
      demanded_.front()->done = begin(demanded_.front()->requested);
      demanded_.pop_front();
    } else if (const int32_t index = table_.next_queued(); index >= 0) {
      Landing& landing = table_[index];
      if (landing.time == 0) landing.time = now;
      table_.begin(index);
      landing.time = begin(landing.time);
    } else {
      break;
    }
  }
  for (int32_t i = 0; i < table_.size(); ++i) {
    Landing& landing = table_[i];
    if (landing.stage == Stage::kQueued && landing.time == 0) landing.time = now;
    if (landing.stage == Stage::kReading && landing.time <= now) landing.stage = Stage::kLanded;
  }
}

CommitResult PacedStore::commit(const std::vector<Placement>& placements, const Copier& copy) {
  CommitResult result;
  std::vector<int32_t> expected;
  std::vector<Transfer> transfers;
  transfers.reserve(placements.size());  // `demanded_` points into it
  std::vector<Copy> copies;
  std::unique_lock<std::mutex> lock(mutex_);
  advance();
  for (const auto& [expert, slot] : placements) {
    copies.push_back({slot, base_ + expert * record_bytes_, size_t(record_bytes_)});
    const int32_t index = table_.find(expert);
    if (index >= 0 && !table_[index].claimed) {
      const bool begun = table_[index].stage != Stage::kQueued;
      result.prefetched += begun && table_[index].kind == Kind::kPrefetch;
      if (!begun) table_.promote(index);
      table_[index].claimed = true;
      expected.push_back(index);
    } else {
      ++stats_.requested;
      transfers.push_back({clock_ns()});
      demanded_.push_back(&transfers.back());
    }
  }
  advance();
  lock.unlock();
  copy(copies);  // the link's time passes meanwhile
  lock.lock();
  for (;;) {
    advance();
    int64_t until = 0;
    bool begun = true;
    const auto wait_for = [&](bool started, int64_t done) {
      begun &= started;
      if (started) until = std::max(until, done);
    };
    for (const Transfer& transfer : transfers) wait_for(transfer.done > 0, transfer.done);
    for (const int32_t index : expected) {
      wait_for(table_[index].stage != Stage::kQueued, table_[index].time);
    }
    if (!begun) until = free_;
    const int64_t start = clock_ns();
    if (begun && until <= start) break;
    lock.unlock();
    sleep_until(until);
    lock.lock();
    result.stall_us += static_cast<int32_t>((clock_ns() - start) / 1000);
  }
  for (const int32_t index : expected) table_.release(index);
  result.records = static_cast<int32_t>(placements.size());
  settle(result);
  return result;
}

}  // namespace

std::shared_ptr<Store> open_paced(const char* base, int64_t record_bytes, int32_t records,
                                 int32_t buffers, double gigabytes_per_second, double latency_us) {
  return std::make_shared<PacedStore>(base, record_bytes, records, buffers, gigabytes_per_second,
                                      latency_us);
}

}  // namespace moejax
