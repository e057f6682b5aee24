// What all stores share: the table of landing buffers, checksums, and the handles of open stores.
#include "store.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <exception>
#include <map>
#include <thread>

#include "handlers.h"

namespace moejax {
namespace {

constexpr int64_t kSpinNs = 150'000;  // a sleeping thread wakes up to this much late

struct Registry {
  std::mutex mutex;
  std::map<int32_t, std::shared_ptr<Store>> stores;
  int32_t next = 1;
  std::string error;  // of the last store that could not be opened
};

// Never destroyed: at exit a handler or a reader thread may still be running.
Registry& registry() {
  static auto* instance = new Registry;
  return *instance;
}

// Handle of the store that `open` returns, or 0; moejax_store_last_error(0) then says why.
template <class Open>
int32_t enter(const Open& open) {
  std::string error;
  try {
    std::shared_ptr<Store> store = open();
    std::lock_guard<std::mutex> lock(registry().mutex);
    const int32_t handle = registry().next++;
    registry().stores.emplace(handle, std::move(store));
    return handle;
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  std::lock_guard<std::mutex> lock(registry().mutex);
  registry().error = error;
  return 0;
}

std::array<std::array<uint32_t, 256>, 8> crc_tables() {
  std::array<std::array<uint32_t, 256>, 8> tables;
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xEDB88320u : 0);
    tables[0][i] = crc;
  }
  for (uint32_t i = 0; i < 256; ++i) {
    for (int k = 1; k < 8; ++k) {
      tables[k][i] = (tables[k - 1][i] >> 8) ^ tables[0][tables[k - 1][i] & 255];
    }
  }
  return tables;
}

}  // namespace

int64_t clock_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void sleep_until(int64_t time) {
  const int64_t left = time - clock_ns() - kSpinNs;
  if (left > 0) std::this_thread::sleep_for(std::chrono::nanoseconds(left));
  while (clock_ns() < time) {  // a thread that yields to a busy one is back milliseconds late
  }
}

std::shared_ptr<Store> find_store(int32_t handle) {
  std::lock_guard<std::mutex> lock(registry().mutex);
  const auto found = registry().stores.find(handle);
  return found == registry().stores.end() ? nullptr : found->second;
}

uint32_t crc32(const void* data, size_t bytes) {
  static const auto tables = crc_tables();
  const uint8_t* at = static_cast<const uint8_t*>(data);
  uint32_t crc = ~0u;
  for (; bytes >= 8; bytes -= 8, at += 8) {
    uint32_t low, high;  // little-endian, as every machine that XLA runs on
    std::memcpy(&low, at, 4);
    std::memcpy(&high, at + 4, 4);
    low ^= crc;
    crc = tables[7][low & 255] ^ tables[6][low >> 8 & 255] ^ tables[5][low >> 16 & 255] ^
          tables[4][low >> 24] ^ tables[3][high & 255] ^ tables[2][high >> 8 & 255] ^
          tables[1][high >> 16 & 255] ^ tables[0][high >> 24];
  }
  for (; bytes > 0; --bytes) crc = (crc >> 8) ^ tables[0][(crc ^ *at++) & 255];
  return ~crc;
}

LandingTable::LandingTable(int32_t records, int32_t buffers)
    : landings_(buffers), of_expert_(records, -1) {}

int32_t LandingTable::oldest(const std::function<bool(const Landing&)>& eligible) const {
  int32_t best = -1;
  for (int32_t i = 0; i < static_cast<int32_t>(landings_.size()); ++i) {
    const Landing& landing = landings_[i];
    if (eligible(landing) && (best < 0 || landing.order < landings_[best].order)) best = i;
  }
  return best;
}

int32_t LandingTable::admit(int32_t expert, Kind kind, Stats* stats) {
  int32_t index =
      oldest([](const Landing& landing) { return landing.stage == Stage::kFree; });
  const auto landed = [](const Landing& landing) {
    return landing.stage == Stage::kLanded && !landing.claimed;
  };
  if (index < 0) {
    index = oldest([&](const Landing& landing) { return landed(landing) && landing.stale; });
    stats->recycled += index >= 0;
  }
  if (index < 0 && kind == Kind::kDemand) {
    index = oldest([](const Landing& landing) {
      return landing.stage == Stage::kQueued && landing.kind == Kind::kPrefetch;
    });
    stats->dropped += index >= 0;
  }
  if (index < 0 && kind == Kind::kDemand) {
    index = oldest([&](const Landing& landing) {
      return landed(landing) && landing.kind == Kind::kPrefetch;
    });
    stats->recycled += index >= 0;
  }
  if (index < 0) {
    ++(kind == Kind::kDemand ? stats->deferred : stats->dropped);
    return -1;
  }
  release(index);
  Landing& landing = landings_[index];
  landing.expert = expert;
  landing.stage = Stage::kQueued;
  landing.kind = kind;
  landing.order = next_order_++;
  of_expert_[expert] = index;
  ++queued_;
  return index;
}

bool LandingTable::spare() const {
  return oldest([](const Landing& landing) {
    return landing.stage == Stage::kFree ||
           (landing.stage == Stage::kLanded && landing.stale && !landing.claimed);
  }) >= 0;
}

int32_t LandingTable::next_queued() const {
  if (queued_ == 0) return -1;
  const auto of = [](Kind kind) {
    return [kind](const Landing& landing) {
      return landing.stage == Stage::kQueued && landing.kind == kind;
    };
  };
  const int32_t demanded = oldest(of(Kind::kDemand));
  return demanded >= 0 ? demanded : oldest(of(Kind::kPrefetch));
}

void LandingTable::begin(int32_t index) {
  landings_[index].stage = Stage::kReading;
  --queued_;
}

void LandingTable::promote(int32_t index) { landings_[index].kind = Kind::kDemand; }

void LandingTable::release(int32_t index) {
  Landing& landing = landings_[index];
  if (landing.stage == Stage::kFree) return;
  queued_ -= landing.stage == Stage::kQueued;
  of_expert_[landing.expert] = -1;
  landing = Landing();
}

void LandingTable::cancel(const bool* keep, Stats* stats) {
  for (int32_t i = 0; i < size(); ++i) {
    Landing& landing = landings_[i];
    if (landing.stage == Stage::kFree || landing.claimed || keep[landing.expert]) continue;
    landing.stale = true;
    if (landing.stage == Stage::kQueued && landing.kind == Kind::kPrefetch) {
      release(i);
      ++stats->cancelled;
    }
  }
}

void LandingTable::drop(const int32_t* slot_of, Stats* stats) {
  for (int32_t i = 0; i < size(); ++i) {
    Landing& landing = landings_[i];
    if (landing.stage == Stage::kFree || landing.claimed || slot_of[landing.expert] >= 0) continue;
    landing.stale = true;
    if (landing.stage == Stage::kReading) continue;
    ++(landing.stage == Stage::kQueued ? stats->cancelled : stats->recycled);
    release(i);
  }
}

Store::Store(int64_t record_bytes, int32_t records, int32_t buffers, double host_us)
    : record_bytes_(record_bytes),
      records_(records),
      host_us_(host_us),
      table_(records, buffers) {}

void Store::request(const int32_t* experts, int32_t count, Kind kind) {
  std::lock_guard<std::mutex> lock(mutex_);
  advance();
  const int64_t now = log_time();
  for (int32_t i = 0; i < count; ++i) {
    if (experts[i] < 0 || experts[i] >= records_) continue;
    int32_t index = table_.find(experts[i]);
    if (index >= 0 && table_[index].stage == Stage::kLanded && table_[index].error != kNone &&
        !table_[index].claimed) {
      table_.release(index);  // a failed read is tried again
      index = -1;
    }
    if (index < 0) {
      index = table_.admit(experts[i], kind, &stats_);
      if (index < 0) continue;
      ++stats_.requested;
      table_[index].requested = now;
      continue;
    }
    table_[index].stale = false;
    if (kind == Kind::kDemand && table_[index].stage == Stage::kQueued) table_.promote(index);
  }
  if (table_.queued() > 0) wake();
}

void Store::cancel(const bool* keep) {
  std::lock_guard<std::mutex> lock(mutex_);
  advance();
  table_.cancel(keep, &stats_);
}

void Store::drop(const int32_t* slot_of) {
  std::lock_guard<std::mutex> lock(mutex_);
  advance();
  table_.drop(slot_of, &stats_);
}

void Store::landed(const int32_t* experts, int64_t count, bool* there) {
  std::lock_guard<std::mutex> lock(mutex_);
  advance();
  for (int64_t i = 0; i < count; ++i) {
    const int32_t index =
        experts[i] < 0 || experts[i] >= records_ ? -1 : table_.find(experts[i]);
    there[i] = index >= 0 && table_[index].stage == Stage::kLanded && table_[index].error == kNone;
  }
}

void Store::host_begin() {
  std::lock_guard<std::mutex> lock(mutex_);
  host_since_ = clock_ns();
}

void Store::host_end(int64_t count, const int32_t* experts, int64_t size) {
  std::unique_lock<std::mutex> lock(mutex_);
  const int64_t since = host_since_;
  host_since_ = 0;
  if (since == 0 || count <= 0) return;
  lock.unlock();  // requests and commits go on meanwhile
  sleep_until(since + static_cast<int64_t>(std::min(kLongestNs, count * host_us_ * 1e3)));
  lock.lock();
  const int64_t now = clock_ns();
  stats_.host_us += (now - since) / 1000;
  stats_.host_experts += count;
  if (!log_.on()) return;
  for (int64_t i = 0; i < size && count > 0; ++i) {
    if (experts[i] < 0) continue;
    log_.add({since, since, now, experts[i], kHostEvent});
    --count;
  }
  for (; count > 0; --count) log_.add({since, since, now, -1, kHostEvent});
}

void Store::log(int64_t capacity) {
  std::lock_guard<std::mutex> lock(mutex_);
  advance();  // what a paced link has begun until now is not of the log
  log_.start(capacity, clock_ns());
}

int64_t Store::event_count() {
  std::lock_guard<std::mutex> lock(mutex_);
  advance();
  return log_.size();
}

int64_t Store::events(Event* to, int64_t count, bool restart, int64_t* dropped) {
  std::lock_guard<std::mutex> lock(mutex_);
  *dropped = log_.dropped();
  const int64_t taken = log_.copy(to, count);
  if (restart) log_.forget(taken);
  return taken;
}

Stats Store::read_stats(bool reset) {
  std::lock_guard<std::mutex> lock(mutex_);
  advance();
  const Stats stats = stats_;
  if (reset) {
    stats_ = Stats();
    stats_.direct = stats.direct;
  }
  return stats;
}

std::string Store::last_error() {
  std::lock_guard<std::mutex> lock(mutex_);
  return last_error_;
}

void Store::settle(const CommitResult& result) {
  stats_.committed += result.records;
  stats_.prefetched += result.prefetched;
  stats_.stall_us += result.stall_us;
}

}  // namespace moejax

using moejax::registry;

MOEJAX_EXPORT int32_t moejax_store_open_disk(const char* path, int64_t data_offset,
                                             int64_t record_bytes, int32_t records,
                                             int32_t threads, int32_t direct, int32_t buffers,
                                             const uint32_t* checksums) {
  return moejax::enter([&] {
    return moejax::open_disk({path, data_offset, record_bytes, records, threads, direct != 0,
                              buffers, checksums});
  });
}

MOEJAX_EXPORT int32_t moejax_store_open_paced(const char* base, int64_t record_bytes,
                                              int32_t records, int32_t buffers,
                                              double gigabytes_per_second, double latency_us,
                                              double host_us, double jitter_us, uint64_t seed) {
  return moejax::enter([&] {
    return moejax::open_paced({base, record_bytes, records, buffers, gigabytes_per_second,
                               latency_us, host_us, jitter_us, seed});
  });
}

// Waits for the reads under way; calls that use the store finish first, since the caller may
// then free the memory that a paced store reads.
MOEJAX_EXPORT void moejax_store_close(int32_t handle) {
  std::shared_ptr<moejax::Store> store;
  {
    std::lock_guard<std::mutex> lock(registry().mutex);
    const auto found = registry().stores.find(handle);
    if (found == registry().stores.end()) return;
    store = std::move(found->second);
    registry().stores.erase(found);
  }
  while (store.use_count() > 1) std::this_thread::sleep_for(std::chrono::microseconds(100));
}

// 1, or 0 when there is no such store.
MOEJAX_EXPORT int32_t moejax_store_stats(int32_t handle, int32_t reset, moejax::Stats* stats) {
  const auto store = moejax::find_store(handle);
  if (!store) return 0;
  *stats = store->read_stats(reset != 0);
  return 1;
}

// Switches the log of events on with a capacity, or off with 0. 1; 0 without such a store, -1 without
// the memory.
MOEJAX_EXPORT int32_t moejax_store_log(int32_t handle, int64_t capacity) {
  const auto store = moejax::find_store(handle);
  if (!store) return 0;
  try {
    store->log(capacity);
  } catch (const std::exception&) {
    return -1;
  }
  return 1;
}

// How many events there are; -1 without such a store.
MOEJAX_EXPORT int64_t moejax_store_event_count(int32_t handle) {
  const auto store = moejax::find_store(handle);
  return store ? store->event_count() : -1;
}

// How many of the events were copied, at most `size`; -1 without such a store.
MOEJAX_EXPORT int64_t moejax_store_events(int32_t handle, moejax::Event* events, int64_t size,
                                          int32_t restart, int64_t* dropped) {
  const auto store = moejax::find_store(handle);
  return store ? store->events(events, size, restart != 0, dropped) : -1;
}

// Now, in microseconds of the clock of the events.
MOEJAX_EXPORT double moejax_clock_us() { return moejax::clock_ns() * 1e-3; }

// Copies the last message of a store, or of the last failed opening for handle 0, cut to `size`.
MOEJAX_EXPORT void moejax_store_last_error(int32_t handle, char* text, int64_t size) {
  std::string message;
  if (const auto store = moejax::find_store(handle)) {
    message = store->last_error();
  } else {
    std::lock_guard<std::mutex> lock(registry().mutex);
    message = registry().error;
  }
  std::strncpy(text, message.c_str(), size - 1);
  text[size - 1] = 0;
}
