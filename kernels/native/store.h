// Stores of expert records behind a link: a file read by threads, or memory behind a paced link.
// Records arrive in landing buffers keyed by expert; a commit moves them into slots.
// Knows nothing of XLA.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "events.h"

namespace moejax {

// Monotonic time.
int64_t clock_ns();

enum Error : int32_t {
  kNone = 0,
  kReadFailed = 1,
  kShortRead = 2,
  kBadChecksum = 3,
  kBadRequest = 4,  // an expert, slot or record size that the store does not have
  kNoStore = 5,
  kHostFailed = 6,  // of experts computed for a GPU: no memory, say
};

enum class Kind : int32_t { kDemand = 0, kPrefetch = 1 };

// What a store has done since it was opened or reset; mirrored by `StoreStats` in store.py.
struct Stats {
  int64_t requested = 0;   // reads asked for, those that were landed or under way not counted
  int64_t landed = 0;      // records read, into landing buffers or slots
  int64_t bytes = 0;       // bytes of them
  int64_t committed = 0;   // records moved into slots
  int64_t prefetched = 0;  // of those, begun as a prefetch before the commit
  int64_t dropped = 0;     // prefetches refused, or displaced before they began: no buffer was free
  int64_t deferred = 0;    // demands without a buffer, left for the commit to read
  int64_t cancelled = 0;   // queued prefetches cancelled
  int64_t recycled = 0;    // landed records thrown away for a newer read
  int64_t coalesced = 0;   // records read together with a neighbour
  int64_t errors = 0;      // records that could not be delivered
  int64_t busy_us = 0;     // time with at least one read under way
  int64_t stall_us = 0;    // time that commits waited
  int64_t host_us = 0;     // time between host_begin and host_end, where experts were computed
  int64_t host_experts = 0;  // experts computed between them
  int64_t direct = 0;      // 1 = the file is read around the page cache
};

struct Copy {
  char* to;
  const char* from;
  size_t bytes;
};
using Copier = std::function<void(const std::vector<Copy>&)>;

// Where a commit puts a record.
struct Placement {
  int32_t expert;
  char* slot;
};

struct CommitResult {
  int32_t error = kNone;
  int32_t records = 0;  // delivered
  int32_t stall_us = 0;
  int32_t prefetched = 0;  // of those delivered
};

enum class Stage : uint8_t { kFree, kQueued, kReading, kLanded };

struct Landing {
  int32_t expert = -1;
  Stage stage = Stage::kFree;
  Kind kind = Kind::kDemand;
  bool stale = false;    // nobody expects it any more: the first to be recycled
  bool claimed = false;  // a commit is moving it
  int32_t error = kNone;
  int64_t order = 0;  // of the request
  int64_t time = 0;   // ns; paced link: of the request while queued, then of completion
  int64_t requested = 0;  // ns; 0 = before the log of events was on
};

// Which landing buffer holds what. Not thread-safe.
class LandingTable {
 public:
  LandingTable(int32_t records, int32_t buffers);

  // Index of the buffer of an expert, or -1.
  int32_t find(int32_t expert) const { return of_expert_[expert]; }
  // Takes a buffer for a read, displacing less urgent ones; -1 = none.
  int32_t admit(int32_t expert, Kind kind, Stats* stats);
  // Whether there is a buffer that nobody expects anything of.
  bool spare() const;
  // Index of the next read to begin, demand before prefetch; -1 = none.
  int32_t next_queued() const;
  void begin(int32_t index);
  void promote(int32_t index);
  void release(int32_t index);
  void cancel(const bool* keep, Stats* stats);
  void drop(const int32_t* slot_of, Stats* stats);

  Landing& operator[](int32_t index) { return landings_[index]; }
  int32_t queued() const { return queued_; }
  int32_t size() const { return static_cast<int32_t>(landings_.size()); }

 private:
  int32_t oldest(const std::function<bool(const Landing&)>& eligible) const;

  std::vector<Landing> landings_;
  std::vector<int32_t> of_expert_;
  int32_t queued_ = 0;
  int64_t next_order_ = 0;
};

// Thread-safe. `request`, `cancel`, `drop` and `landed` never wait for the link.
class Store {
 public:
  Store(int64_t record_bytes, int32_t records, int32_t buffers, double host_us = 0);
  virtual ~Store() = default;

  void request(const int32_t* experts, int32_t count, Kind kind);
  void cancel(const bool* keep);
  // Forgets, landed or queued, the records of experts without a slot (-1).
  void drop(const int32_t* slot_of);
  // Which records wait in landing buffers, so that a commit would not wait for them.
  void landed(const int32_t* experts, int64_t count, bool* there);
  // Fills every slot with its record, read now if need be; with zeros where that fails.
  virtual CommitResult commit(const std::vector<Placement>& placements, const Copier& copy) = 0;

  // The host computes experts from now on, whatever it began before.
  void host_begin();
  // It has computed `count` of them. Returns when it may have: host_us each after it began.
  // `experts` [size] names them, for the log; those below 0 are none.
  void host_end(int64_t count, const int32_t* experts = nullptr, int64_t size = 0);

  // Logs what is moved and computed from now on, the last `capacity` of it; 0 = no longer.
  void log(int64_t capacity);
  int64_t event_count();
  // Copies up to `count` events, the oldest first, and says how many; `restart` forgets these.
  int64_t events(Event* to, int64_t count, bool restart, int64_t* dropped);

  Stats read_stats(bool reset);
  std::string last_error();
  int64_t record_bytes() const { return record_bytes_; }
  int32_t records() const { return records_; }

 protected:
  // Called with the lock held: `advance` before the table changes or statistics are read, `wake`
  // after.
  virtual void advance() {}
  virtual void wake() {}
  void settle(const CommitResult& result);
  // Of the log's clock, which nobody reads while it is off.
  int64_t log_time() const { return log_.on() ? clock_ns() : 0; }

  const int64_t record_bytes_;
  const int32_t records_;
  const double host_us_;  // least time of one expert on the host
  std::mutex mutex_;
  int64_t host_since_ = 0;  // ns; 0 = not computing
  LandingTable table_;
  Stats stats_;
  EventLog log_;
  std::string last_error_;
};

struct DiskOptions {
  std::string path;
  int64_t data_offset;
  int64_t record_bytes;
  int32_t records;
  int32_t threads;
  bool direct;  // read around the page cache where the file system can
  int32_t buffers;
  const uint32_t* checksums;  // CRC-32 of each record, or null; copied
};

struct PacedOptions {
  const char* base;  // of the records, not copied
  int64_t record_bytes;
  int32_t records;
  int32_t buffers;
  double gigabytes_per_second;
  double latency_us;
  double host_us;
  double jitter_us;  // each record takes up to this much longer
  uint64_t seed;     // of how much
};

// Both throw std::runtime_error.
std::shared_ptr<Store> open_disk(const DiskOptions& options);
std::shared_ptr<Store> open_paced(const PacedOptions& options);

constexpr double kLongestNs = 1e18;  // of a transfer or of work: times must not overflow

// Returns then or a few microseconds later: sleeps at first, but not to the end.
void sleep_until(int64_t time);

// CRC-32 of zlib.
uint32_t crc32(const void* data, size_t bytes);

// The open stores, by handle; null = no such store.
std::shared_ptr<Store> find_store(int32_t handle);

}  // namespace moejax
