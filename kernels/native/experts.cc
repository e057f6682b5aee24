// Gated feed-forward networks of the picked experts, read in place from a table of records.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "experts.h"
#include "handlers.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "threads.h"
#include "work.h"

namespace moejax {
namespace {

struct Group {          // the picks of one expert
  const uint8_t* record;
  int64_t first, count;  // in the list of picks
};

struct Plan {
  std::vector<Group> groups;
  std::vector<int64_t> picks;  // n * K + k, grouped by expert
};

std::string plan(const uint8_t* source, int64_t records, int64_t stride, const int32_t* index,
                 int64_t experts, const int32_t* picks, int64_t count, Plan& out) {
  std::vector<int64_t> sizes(experts, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t expert = picks[i];
    if (expert < -1 || expert >= experts) return "pick of expert " + std::to_string(expert);
    if (expert >= 0 && index[expert] >= 0) ++sizes[expert];
  }
  std::vector<int64_t> next(experts, 0);
  int64_t total = 0;
  for (int64_t e = 0; e < experts; ++e) {
    if (!sizes[e]) continue;
    if (index[e] >= records) return "record " + std::to_string(index[e]);
    out.groups.push_back({source + index[e] * stride, total, sizes[e]});
    next[e] = total;
    total += sizes[e];
  }
  out.picks.resize(total);
  for (int64_t i = 0; i < count; ++i) {
    if (picks[i] >= 0 && index[picks[i]] >= 0) out.picks[next[picks[i]]++] = i;
  }
  return "";
}

// Multiplies rows [row0, row1) by the activation rows from(m) of a group, into to(m)[row].
template <class From, class To>
void multiply(const Kernels& k, const Matrix& matrix, Packing packing, int64_t row0, int64_t row1,
              int64_t count, const From& from, const To& to) {
  const void* x[kBlockRows];
  float* y[kBlockRows];
  for (int64_t m = 0; m < count; ++m) {
    x[m] = from(m);
    y[m] = to(m);
  }
  k.multiply(matrix, packing, row0, row1, x, count, y);
}

class Call {
 public:
  Call(const Kernels& kernels, const Plan& plan, int64_t width, int64_t expert_width,
       int64_t top_k, Format format, int64_t gate_up_offset, int64_t down_offset)
      : k_(kernels), plan_(plan), width_(width), hidden_(expert_width), top_k_(top_k),
        format_(format), gate_up_offset_(gate_up_offset),
        down_offset_(down_offset) {}

  template <class Pool>
  void run(Pool& pool, const float* x, int64_t tokens, float* y) {
    const int64_t total = static_cast<int64_t>(plan_.picks.size());
    if (!total) return;
    x_ = Packed(k_, tokens, width_, format_);
    h_ = Packed(k_, total, hidden_, format_);
    hidden_rows_ = scratch(total * hidden_ * 4);
    auto* h = reinterpret_cast<float*>(hidden_rows_.get());
    pack_rows(pool, k_, x, tokens, width_, x_.packing, x_.rows.get());
    const int64_t groups = static_cast<int64_t>(plan_.groups.size());
    const Matrix gate_up{nullptr, 2 * hidden_, width_, format_};
    const Matrix down{nullptr, width_, hidden_, format_};
    const bool small = is_small(groups * (gate_up.bytes() + down.bytes()), total / groups);
    const int64_t threads = pool.num_threads();
    // As many rows of gate as of up.
    const Matrix gate{nullptr, hidden_, width_, format_};
    const auto ups = cut(gate, groups, 1, threads, kMaxHidden);
    parallel_for(pool, static_cast<int64_t>(ups.size()), small, [&](int64_t i) {
      up(plan_.groups[ups[i].matrix], ups[i].row0, ups[i].row1, h);
    });
    pack_rows(pool, k_, h, total, hidden_, h_.packing, h_.rows.get());
    const auto downs = cut(down, groups, 1, threads, width_);
    parallel_for(pool, static_cast<int64_t>(downs.size()), small, [&](int64_t i) {
      lower(plan_.groups[downs[i].matrix], downs[i].row0, downs[i].row1, y);
    });
  }

 private:
  static constexpr int64_t kMaxHidden = 128;

  struct Packed {
    Packing packing = kFloats;
    int64_t stride = 0;
    Scratch rows;

    Packed() = default;
    Packed(const Kernels& k, int64_t count, int64_t cols, Format format)
        : packing(k.packing(format, cols, true)), stride(k.packed_bytes(cols, packing)),
          rows(scratch(count * stride)) {}
  };

  // Hidden values [f0, f1) of one expert's picks.
  void up(const Group& group, int64_t f0, int64_t f1, float* h) {
    const Matrix matrix{group.record + gate_up_offset_, 2 * hidden_, width_, format_};
    float gate[kBlockRows][kMaxHidden], up[kBlockRows][kMaxHidden];
    for (int64_t at = 0; at < group.count; at += kBlockRows) {
      const int64_t first = group.first + at, some = std::min(kBlockRows, group.count - at);
      auto token = [&](int64_t m) {
        return x_.rows.get() + plan_.picks[first + m] / top_k_ * x_.stride;
      };
      multiply(k_, matrix, x_.packing, f0, f1, some, token, [&](int64_t m) { return gate[m] - f0; });
      multiply(k_, matrix, x_.packing, hidden_ + f0, hidden_ + f1, some, token,
               [&](int64_t m) { return up[m] - hidden_ - f0; });
      for (int64_t m = 0; m < some; ++m) {
        k_.swiglu(gate[m], up[m], f1 - f0, h + (first + m) * hidden_ + f0);
      }
    }
  }

  // Results [d0, d1) of one expert's picks.
  void lower(const Group& group, int64_t d0, int64_t d1, float* y) {
    const Matrix matrix{group.record + down_offset_, width_, hidden_, format_};
    for (int64_t at = 0; at < group.count; at += kBlockRows) {
      const int64_t first = group.first + at, some = std::min(kBlockRows, group.count - at);
      auto hidden = [&](int64_t m) { return h_.rows.get() + (first + m) * h_.stride; };
      auto result = [&](int64_t m) { return y + plan_.picks[first + m] * width_; };
      multiply(k_, matrix, h_.packing, d0, d1, some, hidden, result);
    }
  }

  const Kernels& k_;
  const Plan& plan_;
  int64_t width_, hidden_, top_k_;
  Format format_;
  int64_t gate_up_offset_, down_offset_;
  Packed x_, h_;
  Scratch hidden_rows_;
};

}  // namespace

template <class Pool>
std::string run_experts(Pool& pool, const ExpertsWork& work) {
  const Matrix gate_up{nullptr, 2 * work.expert_width, work.width, work.format};
  const Matrix down{nullptr, work.width, work.expert_width, work.format};
  const auto holds = [&](int64_t at, const Matrix& matrix) {
    return at >= 0 && matrix.bytes() <= work.stride - at;
  };
  if (!holds(work.gate_up_offset, gate_up) || !holds(work.down_offset, down)) {
    return "a record of " + std::to_string(work.stride) + " bytes does not hold its matrices";
  }
  Plan grouped;
  const std::string wrong = plan(work.source, work.records, work.stride, work.index, work.experts,
                                 work.picks, work.tokens * work.top_k, grouped);
  if (!wrong.empty()) return wrong + " is out of range";
  Call call(kernels(), grouped, work.width, work.expert_width, work.top_k, work.format,
            work.gate_up_offset, work.down_offset);
  call.run(pool, work.x, work.tokens, work.y);
  return "";
}

template std::string run_experts(ffi::ThreadPool& pool, const ExpertsWork& work);
template std::string run_experts(Threads& pool, const ExpertsWork& work);

namespace {

ffi::Error Experts(ffi::ThreadPool pool, ffi::AnyBuffer source, ffi::Buffer<ffi::S32> index,
                   ffi::Buffer<ffi::S32> picks, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> y_in,
                   ffi::ResultBuffer<ffi::F32> y, int64_t width, int64_t expert_width,
                   int64_t format, int64_t gate_up_offset, int64_t down_offset) {
  const auto shape = picks.dimensions();
  const int64_t tokens = shape[0], top_k = shape[1], records = source.dimensions()[0];
  if (y->typed_data() != y_in.typed_data()) {
    std::memcpy(y->typed_data(), y_in.typed_data(), y_in.size_bytes());
  }
  if (!records || !tokens || !top_k) return ffi::Error::Success();
  const ExpertsWork work{static_cast<const uint8_t*>(source.untyped_data()),
                         records,
                         static_cast<int64_t>(source.size_bytes()) / records,
                         index.typed_data(),
                         static_cast<int64_t>(index.element_count()),
                         picks.typed_data(),
                         tokens,
                         top_k,
                         x.typed_data(),
                         y->typed_data(),
                         width,
                         expert_width,
                         static_cast<Format>(format),
                         gate_up_offset,
                         down_offset};
  const std::string wrong = run_experts(pool, work);
  if (!wrong.empty()) return ffi::Error::InvalidArgument("moejax_experts: " + wrong);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moejax

MOEJAX_HANDLER(moejax_experts, moejax::Experts,
               moejax::ffi::Ffi::Bind()
                   .Ctx<moejax::ffi::ThreadPool>()
                   .Arg<moejax::ffi::AnyBuffer>()
                   .Arg<moejax::ffi::Buffer<moejax::ffi::S32>>()
                   .Arg<moejax::ffi::Buffer<moejax::ffi::S32>>()
                   .Arg<moejax::ffi::Buffer<moejax::ffi::F32>>()
                   .Arg<moejax::ffi::Buffer<moejax::ffi::F32>>()
                   .Ret<moejax::ffi::Buffer<moejax::ffi::F32>>()
                   .Attr<int64_t>("width")
                   .Attr<int64_t>("expert_width")
                   .Attr<int64_t>("format")
                   .Attr<int64_t>("gate_up_offset")
                   .Attr<int64_t>("down_offset"));
