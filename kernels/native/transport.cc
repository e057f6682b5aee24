// Which expert goes where, and getting it there: handlers around stores and slot tables.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <unordered_set>

#include "handlers.h"
#include "parallel.h"
#include "store.h"

namespace moejax {
namespace {

using Ints = ffi::BufferR1<ffi::S32>;
using Int = ffi::BufferR0<ffi::S32>;
using Bools = ffi::BufferR1<ffi::PRED>;
using Bytes = ffi::AnyBuffer;
template <class Buffer>
using Result = ffi::Result<Buffer>;

constexpr int64_t kChunk = 256 << 10;  // bytes that one thread copies at a time

void copy_all(ffi::ThreadPool& pool, const std::vector<Copy>& copies) {
  std::vector<Copy> chunks;
  for (const Copy& copy : copies) {
    for (size_t at = 0; at < copy.bytes; at += kChunk) {
      chunks.push_back({copy.to + at, copy.from + at, std::min<size_t>(kChunk, copy.bytes - at)});
    }
  }
  const int64_t count = chunks.size();
  parallel_for(pool, count, count == 1, [&](int64_t i) {
    std::memcpy(chunks[i].to, chunks[i].from, chunks[i].bytes);
  });
}

// The residency tables of moejax/policies/residency.py.
struct Tables {
  int32_t* slot_of;
  int32_t* owner;
  const int32_t* home;
  int32_t ids, slots;

  void place(int32_t slot, int32_t expert) {
    const int32_t old_owner = owner[slot], old_slot = slot_of[expert];
    if (old_slot >= 0 && old_slot < slots) owner[old_slot] = -1;
    if (old_owner >= 0 && old_owner < ids) slot_of[old_owner] = -1;
    slot_of[expert] = slot;
    owner[slot] = expert;
  }
};

template <class Key>
bool is_nan(Key key) {
  return key != key;
}

// Up to `wanted` slots in the order in which residency.victim would take them one by one: empty
// ones, then by key and slot. But while a slot left has a NaN key, every one left is as good.
template <class Key>
std::vector<int32_t> victims(const Tables& tables, const Key* keys,
                             const std::vector<char>& kept, int32_t layer, int32_t capacity,
                             size_t wanted) {
  struct Candidate {
    Key key;
    int32_t slot;
  };
  std::vector<int32_t> chosen;
  std::vector<Candidate> candidates;
  size_t unordered = 0;  // candidates up to the last with a NaN key
  const int32_t experts = kept.size(), first = layer * experts;
  for (int32_t slot = 0; slot < std::min(capacity, tables.slots); ++slot) {
    if (tables.home[slot] >= 0 && tables.home[slot] != layer) continue;
    const int32_t owner = tables.owner[slot];
    const bool local = owner >= first && owner - first < experts;
    if (owner < 0) {
      chosen.push_back(slot);
    } else if (owner < tables.ids && !(local && kept[owner - first])) {
      candidates.push_back({keys[owner], slot});
      if (is_nan(keys[owner])) unordered = candidates.size();
    }
    if (chosen.size() == wanted) return chosen;
  }
  const size_t rest = std::min(wanted - chosen.size(), candidates.size());
  const auto begin = candidates.begin();
  if (rest > unordered) {
    std::partial_sort(begin + unordered, begin + rest, candidates.end(),
                      [](const Candidate& a, const Candidate& b) {
                        return a.key < b.key || (a.key == b.key && a.slot < b.slot);
                      });
  }
  for (size_t i = 0; i < rest; ++i) chosen.push_back(candidates[i].slot);
  return chosen;
}

ffi::Error plan_fetch(Ints slot_of, Ints owner, Ints home, ffi::AnyBuffer keys, Bools pending,
                      Ints order, Int layer_at, Int capacity_at, Result<Ints> new_slot_of,
                      Result<Ints> new_owner, Result<Ints> slots, Result<Ints> experts,
                      Result<Int> count) {
  const auto keep = [](const Ints& from, Result<Ints>& to) {
    if (from.typed_data() != to->typed_data()) {
      std::memcpy(to->typed_data(), from.typed_data(), from.size_bytes());
    }
  };
  keep(slot_of, new_slot_of);
  keep(owner, new_owner);
  Tables tables{new_slot_of->typed_data(), new_owner->typed_data(), home.typed_data(),
                static_cast<int32_t>(slot_of.element_count()),
                static_cast<int32_t>(owner.element_count())};
  const int32_t per_layer = pending.element_count();
  const int32_t layer = layer_at.typed_data()[0], capacity = capacity_at.typed_data()[0];
  std::fill_n(slots->typed_data(), per_layer, -1);
  std::fill_n(experts->typed_data(), per_layer, -1);
  count->typed_data()[0] = 0;
  if (layer < 0 || layer >= tables.ids / std::max(per_layer, 1)) return ffi::Error::Success();
  std::vector<char> kept(per_layer);
  std::vector<int32_t> missing;
  for (int32_t i = 0; i < per_layer; ++i) {
    const int32_t expert = order.typed_data()[i];
    if (expert < 0 || expert >= per_layer || !pending.typed_data()[expert]) continue;
    const int32_t slot = tables.slot_of[layer * per_layer + expert];
    kept[expert] = slot >= 0 && slot < capacity;
    if (!kept[expert]) missing.push_back(layer * per_layer + expert);
  }
  if (missing.empty()) return ffi::Error::Success();
  const auto chosen =
      keys.element_type() == ffi::S32
          ? victims(tables, keys.typed_data<int32_t>(), kept, layer, capacity, missing.size())
          : victims(tables, keys.typed_data<float>(), kept, layer, capacity, missing.size());
  for (size_t i = 0; i < chosen.size(); ++i) {
    tables.place(chosen[i], missing[i]);
    slots->typed_data()[i] = chosen[i];
    experts->typed_data()[i] = missing[i];
  }
  count->typed_data()[0] = static_cast<int32_t>(chosen.size());
  return ffi::Error::Success();
}

// A pool or store: [rows, R] of any type.
struct Rows {
  char* data;
  int64_t rows, bytes;

  explicit Rows(const ffi::AnyBuffer& buffer)
      : data(static_cast<char*>(buffer.untyped_data())), rows(buffer.dimensions()[0]) {
    bytes = rows ? static_cast<int64_t>(buffer.size_bytes()) / rows : 0;
  }
  char* row(int64_t i) const { return data + i * bytes; }
};

// What `count` pairs of slot and expert ask for. A later pair wins a slot named twice.
struct Moves {
  std::vector<Placement> placements;
  std::vector<char*> lost;  // slots whose expert does not exist
  bool bad = false;

  Moves(const Rows& pool, int64_t records, const Ints& slots, const Ints& experts, int64_t count) {
    std::unordered_set<int32_t> seen;
    for (int64_t i = std::min<int64_t>(count, slots.element_count()) - 1; i >= 0; --i) {
      const int32_t slot = slots.typed_data()[i], expert = experts.typed_data()[i];
      if (expert == -1) continue;
      const bool exists = expert >= 0 && expert < records;
      const bool fits = slot >= 0 && slot < pool.rows;
      bad |= !exists || !fits;
      if (!fits || !seen.insert(slot).second) continue;
      if (exists) {
        placements.push_back({expert, pool.row(slot)});
      } else {
        lost.push_back(pool.row(slot));
      }
    }
    std::reverse(placements.begin(), placements.end());
  }
};

ffi::Error check_alias(const Bytes& pool, Result<Bytes>& new_pool) {
  if (pool.untyped_data() == new_pool->untyped_data()) return ffi::Error::Success();
  return ffi::Error::Internal("XLA did not alias the pool of slots");
}

ffi::Error copy_records(ffi::ThreadPool threads, Bytes pool, Bytes store, Ints slots,
                        Ints experts, Int count, ffi::AnyBuffer, Result<Bytes> new_pool) {
  if (ffi::Error error = check_alias(pool, new_pool); error.failure()) return error;
  const Rows to(pool), from(store);
  std::vector<Copy> copies;
  const Moves moves(to, from.rows, slots, experts, count.typed_data()[0]);
  for (const auto& [expert, slot] : moves.placements) {
    copies.push_back({slot, from.row(expert), static_cast<size_t>(to.bytes)});
  }
  copy_all(threads, copies);
  return ffi::Error::Success();
}

ffi::Error request(Int handle, Ints experts, Int count, Int kind, ffi::AnyBuffer,
                   Result<Ints> token) {
  const auto store = find_store(handle.typed_data()[0]);
  token->typed_data()[0] = store ? kNone : kNoStore;
  if (store) {
    store->request(experts.typed_data(),
                   std::min<int64_t>(count.typed_data()[0], experts.element_count()),
                   kind.typed_data()[0] == 0 ? Kind::kDemand : Kind::kPrefetch);
  }
  return ffi::Error::Success();
}

ffi::Error cancel(Int handle, Bools keep, ffi::AnyBuffer, Result<Ints> token) {
  const auto store = find_store(handle.typed_data()[0]);
  token->typed_data()[0] = store ? kNone : kNoStore;
  if (store && store->records() != static_cast<int64_t>(keep.element_count())) {
    token->typed_data()[0] = kBadRequest;
  } else if (store) {
    store->cancel(keep.typed_data());
  }
  return ffi::Error::Success();
}

ffi::Error drop(Int handle, Ints slot_of, ffi::AnyBuffer, Result<Ints> token) {
  const auto store = find_store(handle.typed_data()[0]);
  token->typed_data()[0] = store ? kNone : kNoStore;
  if (store && store->records() != static_cast<int64_t>(slot_of.element_count())) {
    token->typed_data()[0] = kBadRequest;
  } else if (store) {
    store->drop(slot_of.typed_data());
  }
  return ffi::Error::Success();
}

ffi::Error landed(Int handle, Ints experts, ffi::AnyBuffer, Result<Bools> there) {
  const auto store = find_store(handle.typed_data()[0]);
  std::fill_n(there->typed_data(), there->element_count(), false);
  if (store) store->landed(experts.typed_data(), experts.element_count(), there->typed_data());
  return ffi::Error::Success();
}

// Never an FFI error for what a store does: the donated state must survive it.
ffi::Error commit(ffi::ThreadPool threads, Int handle, Bytes pool, Ints slots, Ints experts,
                  Int count, ffi::AnyBuffer, Result<Bytes> new_pool, Result<Ints> status) {
  if (ffi::Error error = check_alias(pool, new_pool); error.failure()) return error;
  const Rows to(pool);
  const auto store = find_store(handle.typed_data()[0]);
  const bool fits = store && store->record_bytes() == to.bytes;
  const Moves moves(to, fits ? store->records() : 0, slots, experts, count.typed_data()[0]);
  CommitResult result;
  if (!moves.placements.empty()) {
    result = store->commit(moves.placements, [&](const std::vector<Copy>& copies) {
      copy_all(threads, copies);
    });
  }
  for (char* slot : moves.lost) std::memset(slot, 0, to.bytes);
  if (result.error == kNone && moves.bad) result.error = store ? kBadRequest : kNoStore;
  int32_t* out = status->typed_data();
  out[0] = result.error;
  out[1] = result.records;
  out[2] = result.stall_us;
  out[3] = result.prefetched;
  return ffi::Error::Success();
}

ffi::Error host_begin(Int handle, ffi::AnyBuffer, Result<Ints> token) {
  const auto store = find_store(handle.typed_data()[0]);
  token->typed_data()[0] = store ? kNone : kNoStore;
  if (store) store->host_begin();
  return ffi::Error::Success();
}

ffi::Error host_end(Int handle, Int count, Ints experts, ffi::AnyBuffer, Result<Ints> token) {
  const auto store = find_store(handle.typed_data()[0]);
  token->typed_data()[0] = store ? kNone : kNoStore;
  if (store) {
    store->host_end(count.typed_data()[0], experts.typed_data(), experts.element_count());
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moejax

namespace ffi = xla::ffi;
using moejax::Bools;
using moejax::Bytes;
using moejax::Int;
using moejax::Ints;

MOEJAX_HANDLER(moejax_plan_fetch, moejax::plan_fetch,
               ffi::Ffi::Bind()
                   .Arg<Ints>()
                   .Arg<Ints>()
                   .Arg<Ints>()
                   .Arg<ffi::AnyBuffer>()
                   .Arg<Bools>()
                   .Arg<Ints>()
                   .Arg<Int>()
                   .Arg<Int>()
                   .Ret<Ints>()
                   .Ret<Ints>()
                   .Ret<Ints>()
                   .Ret<Ints>()
                   .Ret<Int>());

MOEJAX_HANDLER(moejax_copy_records, moejax::copy_records,
               ffi::Ffi::Bind()
                   .Ctx<ffi::ThreadPool>()
                   .Arg<Bytes>()
                   .Arg<Bytes>()
                   .Arg<Ints>()
                   .Arg<Ints>()
                   .Arg<Int>()
                   .Arg<ffi::AnyBuffer>()
                   .Ret<Bytes>());

MOEJAX_HANDLER(moejax_request, moejax::request,
               ffi::Ffi::Bind()
                   .Arg<Int>()
                   .Arg<Ints>()
                   .Arg<Int>()
                   .Arg<Int>()
                   .Arg<ffi::AnyBuffer>()
                   .Ret<Ints>());

MOEJAX_HANDLER(moejax_cancel, moejax::cancel,
               ffi::Ffi::Bind().Arg<Int>().Arg<Bools>().Arg<ffi::AnyBuffer>().Ret<Ints>());

MOEJAX_HANDLER(moejax_drop, moejax::drop,
               ffi::Ffi::Bind().Arg<Int>().Arg<Ints>().Arg<ffi::AnyBuffer>().Ret<Ints>());

MOEJAX_HANDLER(moejax_landed, moejax::landed,
               ffi::Ffi::Bind().Arg<Int>().Arg<Ints>().Arg<ffi::AnyBuffer>().Ret<Bools>());

MOEJAX_HANDLER(moejax_commit, moejax::commit,
               ffi::Ffi::Bind()
                   .Ctx<ffi::ThreadPool>()
                   .Arg<Int>()
                   .Arg<Bytes>()
                   .Arg<Ints>()
                   .Arg<Ints>()
                   .Arg<Int>()
                   .Arg<ffi::AnyBuffer>()
                   .Ret<Bytes>()
                   .Ret<Ints>());

MOEJAX_HANDLER(moejax_host_begin, moejax::host_begin,
               ffi::Ffi::Bind().Arg<Int>().Arg<ffi::AnyBuffer>().Ret<Ints>());

MOEJAX_HANDLER(moejax_host_end, moejax::host_end,
               ffi::Ffi::Bind()
                   .Arg<Int>()
                   .Arg<Int>()
                   .Arg<Ints>()
                   .Arg<ffi::AnyBuffer>()
                   .Ret<Ints>());
