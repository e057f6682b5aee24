// Records in memory behind a link of a stated rate and latency.
#include <algorithm>
#include <deque>
#include <random>

#include "store.h"

namespace moejax {
namespace {

// Records in memory that arrive as over a serial link of a given rate. Nothing moves before a
// commit copies it: the link is a calculation, brought up to date whenever it is used, so it costs
// no thread and its times do not depend on when a thread wakes.
class PacedStore final : public Store {
 public:
  explicit PacedStore(const PacedOptions& options)
      : Store(options.record_bytes, options.records, options.buffers, options.host_us),
        base_(options.base),
        transfer_ns_(std::min(kLongestNs, options.latency_us * 1e3 +
                                              record_bytes_ / options.gigabytes_per_second)),
        jitter_ns_(std::min(kLongestNs, options.jitter_us * 1e3)),
        random_(options.seed) {}
  CommitResult commit(const std::vector<Placement>& placements, const Copier& copy) override;

 private:
  struct Transfer {
    int32_t expert;
    int64_t requested;
    int64_t done = 0;  // ns; 0 = not begun
  };
  void advance() override;
  void wake() override { advance(); }
  int64_t begin(int32_t expert, Kind kind, int64_t requested);

  const char* const base_;
  const double transfer_ns_;
  const double jitter_ns_;
  std::mt19937_64 random_;
  int64_t free_ = 0;                // ns; when the link has done what it has begun
  int64_t busy_ns_ = 0;             // not yet in the statistics, less than a microsecond
  std::deque<Transfer*> demanded_;  // by waiting commits, without a landing buffer
};

int64_t PacedStore::begin(int32_t expert, Kind kind, int64_t requested) {
  double transfer = transfer_ns_;
  if (jitter_ns_ > 0) transfer += jitter_ns_ * static_cast<double>(random_() >> 11) * 0x1p-53;
  const int64_t taken = static_cast<int64_t>(transfer);
  const int64_t begun = std::max(free_, requested);
  free_ = begun + taken;
  busy_ns_ += taken;
  stats_.busy_us += busy_ns_ / 1000;
  busy_ns_ %= 1000;
  ++stats_.landed;
  stats_.bytes += record_bytes_;
  if (log_.on()) log_.add({requested, begun, free_, expert, static_cast<int32_t>(kind)});
  return free_;
}

// Begins, in order of urgency, what the link has had time to begin.
void PacedStore::advance() {
  const int64_t now = clock_ns();
  while (free_ <= now) {
    if (!demanded_.empty()) {
      Transfer* const first = demanded_.front();
      first->done = begin(first->expert, Kind::kDemand, first->requested);
      demanded_.pop_front();
    } else if (const int32_t index = table_.next_queued(); index >= 0) {
      Landing& landing = table_[index];
      if (landing.time == 0) landing.time = now;
      table_.begin(index);
      landing.time = begin(landing.expert, landing.kind, landing.time);
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
      transfers.push_back({expert, clock_ns()});
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

std::shared_ptr<Store> open_paced(const PacedOptions& options) {
  return std::make_shared<PacedStore>(options);
}

}  // namespace moejax
