// Tables of records in host memory by handle, and the experts computed from them.
#include "host.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>

#include "handlers.h"
#include "threads.h"

namespace moejax {
namespace {

struct Table {
  const uint8_t* data;
  int64_t records, stride;
};

struct Tables {
  std::mutex mutex;
  std::unordered_map<int32_t, std::shared_ptr<const Table>> open;
  int32_t next = 1;
  std::string last_error;
};

Tables& tables() {
  static Tables& all = *new Tables;  // never destroyed: a stream may still use one
  return all;
}

std::shared_ptr<const Table> find_table(int32_t handle) {
  std::lock_guard<std::mutex> lock(tables().mutex);
  const auto found = tables().open.find(handle);
  return found == tables().open.end() ? nullptr : found->second;
}

void note(const std::string& error) {
  std::lock_guard<std::mutex> lock(tables().mutex);
  tables().last_error = error;
}

Error compute(int32_t handle, ExpertsWork work) {
  const std::shared_ptr<const Table> table = find_table(handle);
  if (!table) {
    note("the records of handle " + std::to_string(handle) + " are closed");
    return kNoStore;
  }
  work.source = table->data;
  work.records = table->records;
  work.stride = table->stride;
  const std::string wrong = run_experts(Threads::shared(), work);
  if (!wrong.empty()) note(wrong);
  return wrong.empty() ? kNone : kBadRequest;
}

}  // namespace

Error compute_on_host(int32_t table, ExpertsWork work) noexcept {
  Error error = kHostFailed;
  try {
    error = compute(table, work);
  } catch (const std::exception& caught) {
    try {
      note(caught.what());
    } catch (...) {  // no memory for the message either
    }
  } catch (...) {
  }
  if (error != kNone) {
    std::fill_n(work.y, work.tokens * work.top_k * work.width,
                std::numeric_limits<float>::quiet_NaN());
  }
  return error;
}

}  // namespace moejax

// Handle of [records, stride] bytes, which must stay there until it is closed.
MOEJAX_EXPORT int32_t moejax_host_open(const void* data, int64_t records, int64_t stride) {
  moejax::Tables& tables = moejax::tables();
  std::lock_guard<std::mutex> lock(tables.mutex);
  const auto* bytes = static_cast<const uint8_t*>(data);
  tables.open[tables.next] = std::make_shared<moejax::Table>(moejax::Table{bytes, records, stride});
  return tables.next++;
}

// Waits for computations under way; later ones of the handle fail.
MOEJAX_EXPORT void moejax_host_close(int32_t handle) {
  std::shared_ptr<const moejax::Table> table;
  {
    std::lock_guard<std::mutex> lock(moejax::tables().mutex);
    const auto found = moejax::tables().open.find(handle);
    if (found == moejax::tables().open.end()) return;
    table = std::move(found->second);
    moejax::tables().open.erase(found);
  }
  while (table.use_count() > 1) std::this_thread::sleep_for(std::chrono::microseconds(100));
}

// An Error; see ExpertsWork for the arguments.
MOEJAX_EXPORT int32_t moejax_host_experts(int32_t table, const int32_t* index, int64_t experts,
                                          const int32_t* picks, int64_t tokens, int64_t top_k,
                                          const float* x, float* y, int64_t width,
                                          int64_t expert_width, int64_t format,
                                          int64_t gate_up_offset, int64_t down_offset) {
  return moejax::compute_on_host(
      table, {nullptr, 0, 0, index, experts, picks, tokens, top_k, x, y, width, expert_width,
              static_cast<moejax::Format>(format), gate_up_offset, down_offset});
}

// The last reason for an Error, cut to `size` bytes with the final zero.
MOEJAX_EXPORT void moejax_host_last_error(char* text, int64_t size) {
  std::lock_guard<std::mutex> lock(moejax::tables().mutex);
  const std::string& error = moejax::tables().last_error;
  const int64_t length = std::min<int64_t>(size - 1, static_cast<int64_t>(error.size()));
  std::memcpy(text, error.data(), length);
  text[length] = 0;
}
