// A file whose records a pool of threads reads.
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <thread>

#include "owned.h"
#include "store.h"

namespace moejax {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kCoalesceBytes = 1 << 20;  // beyond this one read is as fast as two
constexpr size_t kMaxBatch = 64;             // records in one read

int64_t round_up(int64_t size, int64_t alignment) {
  return (size + alignment - 1) / alignment * alignment;
}

bool aligned(const void* pointer, int64_t alignment) {
  return reinterpret_cast<uintptr_t>(pointer) % alignment == 0;
}

struct Alignment {
  int64_t memory = kPage;
  int64_t offset = kPage;
};

Alignment direct_alignment([[maybe_unused]] int descriptor) {
  Alignment result;
#ifdef STATX_DIOALIGN
  struct statx info;
  if (statx(descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 &&
      (info.stx_mask & STATX_DIOALIGN) && info.stx_dio_mem_align && info.stx_dio_offset_align) {
    result.memory = info.stx_dio_mem_align;
    result.offset = info.stx_dio_offset_align;
  }
#endif
  return result;
}

// A record on its way: into a landing buffer, or into the slot of a waiting commit.
struct Read {
  int32_t expert;
  char* to;
  int32_t landing;    // -1 = into a slot
  int32_t error;
  int32_t* result;    // of a waiting commit
  int32_t* waiting;   // reads that it still waits for
  int64_t requested;  // ns; for the log
  int64_t begun = 0;
};

class DiskStore final : public Store {
 public:
  explicit DiskStore(const DiskOptions& options);
  ~DiskStore() override { stop(); }
  CommitResult commit(const std::vector<Placement>& placements, const Copier& copy) override;

 private:
  void advance() override;
  void wake() override { work_.notify_all(); }
  void stop();
  void read_loop();
  void take_batch(std::deque<Read>* batch);
  bool take_neighbour(int32_t expert, bool into_slots, Kind kind, bool front,
                     std::deque<Read>* batch);
  Read landing_read(int32_t index);
  void read_batch(std::deque<Read>* batch, std::unique_ptr<Mapping>* bounce, std::string* message);
  bool read_together(const std::deque<Read>& batch, std::unique_ptr<Mapping>* bounce);
  void read_alone(Read* read, std::string* message);
  void finish(const std::deque<Read>& batch);
  int32_t claim(int32_t expert, const char* slot, int64_t* requested);

  const std::string path_;
  const int64_t data_offset_;
  const int64_t stride_;  // of landing buffers
  std::vector<uint32_t> checksums_;
  Mapping buffers_;
  File file_;
  File direct_file_;
  std::atomic<bool> direct_{false};
  Alignment alignment_;
  std::deque<Read> slot_reads_;
  int32_t active_ = 0;
  int64_t active_since_ = 0;  // ns; from when on it is not in the statistics
  bool stopping_ = false;
  std::condition_variable work_;
  std::condition_variable done_;
  std::vector<std::thread> readers_;
};

DiskStore::DiskStore(const DiskOptions& options)
    : Store(options.record_bytes, options.records, options.buffers),
      path_(options.path),
      data_offset_(options.data_offset),
      stride_(round_up(options.record_bytes, kPage)),
      buffers_(stride_ * options.buffers) {
  if (options.data_offset < 0) throw std::runtime_error("a file has no negative offsets");
  int64_t end;
  if (__builtin_mul_overflow(record_bytes_, int64_t{records_}, &end) ||
      __builtin_add_overflow(end, data_offset_, &end)) {
    throw std::runtime_error(path_ + ": the records end beyond any file");
  }
  if (options.threads < 1) throw std::runtime_error("a store needs at least one reader thread");
  if (options.checksums) {
    checksums_.assign(options.checksums, options.checksums + options.records);
  }
  if (!file_.open_path(path_, 0)) throw std::runtime_error(path_ + ": " + std::strerror(errno));
#ifdef O_DIRECT
  if (options.direct && direct_file_.open_path(path_, O_DIRECT)) {
    alignment_ = direct_alignment(direct_file_.get());
    direct_ = record_bytes_ % alignment_.offset == 0 && data_offset_ % alignment_.offset == 0;
  }
#endif
  stats_.direct = direct_;
  try {
    for (int32_t i = 0; i < options.threads; ++i) readers_.emplace_back([this] { read_loop(); });
  } catch (...) {
    stop();
    throw;
  }
}

void DiskStore::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  for (std::thread& reader : readers_) reader.join();
}

void DiskStore::advance() {
  if (active_ == 0) return;
  const int64_t busy_us = (clock_ns() - active_since_) / 1000;
  stats_.busy_us += busy_us;
  active_since_ += busy_us * 1000;
}

void DiskStore::read_loop() {
  std::unique_ptr<Mapping> bounce;
  std::deque<Read> batch;
  std::string message;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    work_.wait(lock, [&] { return stopping_ || !slot_reads_.empty() || table_.queued() > 0; });
    if (stopping_) return;
    take_batch(&batch);
    if (log_.on()) {
      const int64_t now = clock_ns();
      for (Read& read : batch) read.begun = now;
    }
    if (active_++ == 0) active_since_ = clock_ns();
    lock.unlock();
    read_batch(&batch, &bounce, &message);
    lock.lock();
    advance();
    --active_;
    if (!message.empty()) last_error_.swap(message);
    message.clear();
    finish(batch);
    done_.notify_all();
  }
}

Read DiskStore::landing_read(int32_t index) {
  table_.begin(index);
  const Landing& landing = table_[index];
  return {landing.expert, buffers_.data() + index * stride_, index, kNone, nullptr, nullptr,
          landing.requested};
}

// The most urgent read, with those of the same urgency that follow or precede it in the file.
void DiskStore::take_batch(std::deque<Read>* batch) {
  batch->clear();
  const bool into_slots = !slot_reads_.empty();
  Kind kind = Kind::kDemand;
  if (into_slots) {
    batch->push_back(slot_reads_.front());
    slot_reads_.pop_front();
  } else {
    const int32_t index = table_.next_queued();
    kind = table_[index].kind;
    batch->push_back(landing_read(index));
  }
  while (batch->size() < kMaxBatch &&
         static_cast<int64_t>(batch->size() + 1) * record_bytes_ <= kCoalesceBytes) {
    if (!take_neighbour(batch->back().expert + 1, into_slots, kind, false, batch) &&
        !take_neighbour(batch->front().expert - 1, into_slots, kind, true, batch)) {
      break;
    }
  }
  stats_.coalesced += static_cast<int64_t>(batch->size()) - 1;
}

bool DiskStore::take_neighbour(int32_t expert, bool into_slots, Kind kind, bool front,
                              std::deque<Read>* batch) {
  if (expert < 0 || expert >= records_) return false;
  Read read;
  if (into_slots) {
    auto found = std::find_if(slot_reads_.begin(), slot_reads_.end(),
                              [&](const Read& other) { return other.expert == expert; });
    if (found == slot_reads_.end()) return false;
    read = *found;
    slot_reads_.erase(found);
  } else {
    const int32_t index = table_.find(expert);
    if (index < 0 || table_[index].stage != Stage::kQueued || table_[index].kind != kind) {
      return false;
    }
    read = landing_read(index);
  }
  batch->insert(front ? batch->begin() : batch->end(), read);
  return true;
}

void DiskStore::read_batch(std::deque<Read>* batch, std::unique_ptr<Mapping>* bounce,
                          std::string* message) {
  // One bad record must not spoil its neighbours, so what fails together is read again alone.
  const bool together = read_together(*batch, bounce);
  for (Read& read : *batch) {
    if (!together) read_alone(&read, message);
    if (read.error == kNone && !checksums_.empty() &&
        crc32(read.to, record_bytes_) != checksums_[read.expert]) {
      read.error = kBadChecksum;
      *message = path_ + ": expert " + std::to_string(read.expert) + " is damaged";
    }
    if (read.error != kNone) std::memset(read.to, 0, record_bytes_);
  }
}

bool DiskStore::read_together(const std::deque<Read>& batch, std::unique_ptr<Mapping>* bounce) {
  const int64_t total = record_bytes_ * batch.size();
  const int64_t offset = data_offset_ + batch.front().expert * record_bytes_;
  const bool direct = direct_;
  const bool bounced = direct && !std::all_of(batch.begin(), batch.end(), [&](const Read& read) {
    return aligned(read.to, alignment_.memory);
  });
  std::array<iovec, kMaxBatch> parts;
  int count = 0;
  if (bounced) {
    if (!*bounce) *bounce = std::make_unique<Mapping>(std::max(kCoalesceBytes, stride_));
    parts[count++] = {(*bounce)->data(), static_cast<size_t>(total)};
  } else {
    for (const Read& read : batch) parts[count++] = {read.to, static_cast<size_t>(record_bytes_)};
  }
  const int descriptor = direct ? direct_file_.get() : file_.get();
  ssize_t got;
  do {
    got = preadv(descriptor, parts.data(), count, offset);
  } while (got < 0 && errno == EINTR);
  if (direct && got < 0 && errno == EINVAL) direct_ = false;  // refused only now
  if (got != total) return false;
  if (bounced) {
    const char* from = (*bounce)->data();
    for (const Read& read : batch) {
      std::memcpy(read.to, from, record_bytes_);
      from += record_bytes_;
    }
  }
  return true;
}

// Through the page cache, which has no alignment to keep at the end of a truncated file.
void DiskStore::read_alone(Read* read, std::string* message) {
  const int64_t offset = data_offset_ + read->expert * record_bytes_;
  int64_t done = 0;
  while (done < record_bytes_) {
    const ssize_t got =
        pread(file_.get(), read->to + done, record_bytes_ - done, offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      read->error = got < 0 ? kReadFailed : kShortRead;
      *message = path_ + ": expert " + std::to_string(read->expert) + ": " +
                 (got < 0 ? std::strerror(errno) : "the file ends before its record does");
      return;
    }
    done += got;
  }
}

void DiskStore::finish(const std::deque<Read>& batch) {
  stats_.direct = direct_;
  const int64_t now = log_time();
  for (const Read& read : batch) {
    if (read.error == kNone) {
      ++stats_.landed;
      stats_.bytes += record_bytes_;
    }
    if (read.error == kNone && log_.on()) {
      const Kind kind = read.landing >= 0 ? table_[read.landing].kind : Kind::kDemand;
      log_.add({read.requested, read.begun, now, read.expert, static_cast<int32_t>(kind)});
    }
    if (read.landing >= 0) {
      table_[read.landing].stage = Stage::kLanded;
      table_[read.landing].error = read.error;
    } else {
      *read.result = read.error;
      --*read.waiting;
    }
  }
}

// The buffer in which a record has landed or will; -1 = it is to be read straight into its slot.
// `requested`, now, becomes the time of an earlier request that it takes over.
int32_t DiskStore::claim(int32_t expert, const char* slot, int64_t* requested) {
  int32_t index = table_.find(expert);
  const bool claimed = index >= 0 && table_[index].claimed;
  const bool begun = index >= 0 && table_[index].stage != Stage::kQueued;
  // Direct reads cannot reach an unaligned slot. The copy is then made here rather than by a
  // reader, which has the next record to read; an aligned slot needs none.
  const bool reachable = !direct_ || aligned(slot, alignment_.memory);
  if (index < 0 || claimed) ++stats_.requested;
  if (claimed) return -1;
  if (index >= 0 && !begun && reachable) {
    *requested = table_[index].requested;
    table_.release(index);
    return -1;
  }
  if (index < 0 && !reachable && table_.spare()) {
    index = table_.admit(expert, Kind::kDemand, &stats_);
    table_[index].requested = *requested;
  }
  if (index < 0) return -1;
  if (!begun) table_.promote(index);
  table_[index].claimed = true;
  return index;
}

CommitResult DiskStore::commit(const std::vector<Placement>& placements, const Copier& copy) {
  struct Arrival {
    int32_t landing;
    char* slot;
    int32_t* error;
  };
  CommitResult result;
  std::vector<Arrival> expected, arrived;
  std::vector<int32_t> errors(placements.size(), kNone);
  int32_t waiting = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  for (size_t i = 0; i < placements.size(); ++i) {
    const auto [expert, slot] = placements[i];
    int64_t requested = log_time();
    if (const int32_t index = claim(expert, slot, &requested); index >= 0) {
      expected.push_back({index, slot, &errors[i]});
      continue;
    }
    slot_reads_.push_back({expert, slot, -1, kNone, &errors[i], &waiting, requested});
    ++waiting;
  }
  wake();
  std::vector<Copy> copies;
  while (!expected.empty() || waiting > 0) {
    const auto middle =
        std::partition(expected.begin(), expected.end(), [&](const Arrival& arrival) {
          return table_[arrival.landing].stage != Stage::kLanded;
        });
    arrived.assign(middle, expected.end());
    expected.erase(middle, expected.end());
    if (arrived.empty()) {
      const int64_t start = clock_ns();
      done_.wait(lock);
      result.stall_us += static_cast<int32_t>((clock_ns() - start) / 1000);
      continue;
    }
    copies.clear();
    for (const auto& [index, slot, error] : arrived) {
      const Landing& landing = table_[index];
      *error = landing.error;
      result.prefetched += landing.error == kNone && landing.kind == Kind::kPrefetch;
      copies.push_back({slot, buffers_.data() + index * stride_, size_t(record_bytes_)});
    }
    lock.unlock();
    copy(copies);
    lock.lock();
    for (const Arrival& arrival : arrived) table_.release(arrival.landing);
  }
  const auto failed = [](int32_t error) { return error != kNone; };
  const auto bad = std::find_if(errors.begin(), errors.end(), failed);
  if (bad != errors.end()) result.error = *bad;
  const auto failures = std::count_if(errors.begin(), errors.end(), failed);
  stats_.errors += failures;
  result.records = static_cast<int32_t>(placements.size() - failures);
  settle(result);
  return result;
}

}  // namespace

std::shared_ptr<Store> open_disk(const DiskOptions& options) {
  return std::make_shared<DiskStore>(options);
}

}  // namespace moejax
