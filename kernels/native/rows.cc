// Norm, softmax and attention: one result per row, whatever stands beside it.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "handlers.h"
#include "kernels.h"
#include "parallel.h"
#include "work.h"

namespace moejax {
namespace {

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

bool is_bf16(const ffi::AnyBuffer& bits) { return ffi::ByteWidth(bits.element_type()) == 2; }

ffi::Error bad_layer(const char* what, int64_t layer, int64_t layers) {
  return ffi::Error::InvalidArgument(std::string(what) + ": layer " + std::to_string(layer) +
                                     " of a stack of " + std::to_string(layers));
}

// body(first row, count) over all rows.
template <class Body>
void over_rows(ffi::ThreadPool& pool, int64_t rows, int64_t cols, const Body& body) {
  const int64_t some = std::max<int64_t>(1, (16 << 10) / std::max<int64_t>(1, cols));
  parallel_for(pool, (rows + some - 1) / some, rows * cols * 4 < 2 * kSmallBytes, [&](int64_t i) {
    body(i * some, std::min(some, rows - i * some));
  });
}

ffi::Error RmsNorm(ffi::ThreadPool pool, F32 x, ffi::AnyBuffer bits, S32 layer,
                   ffi::ResultBuffer<ffi::F32> y, float eps) {
  const int64_t layers = bits.dimensions()[0], at = *layer.typed_data();
  if (at < 0 || at >= layers) return bad_layer("moejax_rms_norm", at, layers);
  const int64_t stride = static_cast<int64_t>(bits.size_bytes()) / layers;
  const bool bf16 = is_bf16(bits);
  const int64_t cols = stride / (bf16 ? 2 : 4);
  const int64_t rows = cols ? static_cast<int64_t>(x.element_count()) / cols : 0;
  const auto* weight = static_cast<const uint8_t*>(bits.untyped_data()) + at * stride;
  over_rows(pool, rows, cols, [&](int64_t first, int64_t count) {
    kernels().rms_norm(x.typed_data() + first * cols, count, cols, weight, bf16, eps,
                       y->typed_data() + first * cols);
  });
  return ffi::Error::Success();
}

ffi::Error Softmax(ffi::ThreadPool pool, F32 x, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t cols = x.dimensions().back();
  const int64_t rows = cols ? static_cast<int64_t>(x.element_count()) / cols : 0;
  over_rows(pool, rows, cols, [&](int64_t first, int64_t count) {
    kernels().softmax(x.typed_data() + first * cols, count, cols, y->typed_data() + first * cols);
  });
  return ffi::Error::Success();
}

ffi::Error Attend(ffi::ThreadPool pool, F32 query, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                  S32 layer, S32 positions, ffi::Buffer<ffi::PRED> valid, S32 window,
                  ffi::ResultBuffer<ffi::F32> out, float scale) {
  const auto q = query.dimensions(), k = keys.dimensions();
  const int64_t batch = q[0], tokens = q[1], heads = q[2], key_dim = q[3];
  const int64_t layers = k[0], context = k[2], groups = k[3];
  const int64_t value_dim = values.dimensions()[4], at = *layer.typed_data();
  if (at < 0 || at >= layers) return bad_layer("moejax_attend", at, layers);
  const int32_t* position = positions.typed_data();
  const bool* used = valid.typed_data();
  int64_t work = 0;
  for (int64_t i = 0; i < batch * tokens; ++i) {
    if (!used[i]) continue;
    if (position[i] < 0 || position[i] >= context) {
      return ffi::Error::InvalidArgument("moejax_attend: position " + std::to_string(position[i]) +
                                         " of a cache of " + std::to_string(context));
    }
    work += position[i] + 1;
  }
  const bool bf16 = is_bf16(keys);
  const int64_t item = bf16 ? 2 : 4, per_group = heads / groups;
  const int64_t sets = (per_group + kHeads - 1) / kHeads;  // of heads that share reads
  const int64_t span = *window.typed_data();
  const auto* key = static_cast<const uint8_t*>(keys.untyped_data());
  const auto* value = static_cast<const uint8_t*>(values.untyped_data());
  const bool small = work * groups * (key_dim + value_dim) * item * per_group < 2 * kSmallBytes;
  parallel_for(pool, batch * groups * sets * tokens, small, [&](int64_t i) {
    const int64_t t = i % tokens, set = i / tokens % sets;
    const int64_t g = i / tokens / sets % groups, b = i / tokens / sets / groups;
    const int64_t h = g * per_group + set * kHeads;
    const int64_t some = std::min(kHeads, per_group - set * kHeads);
    const int64_t token = b * tokens + t, row = (at * batch + b) * context * groups + g;
    float* to = out->typed_data() + (token * heads + h) * value_dim;
    if (!used[token]) {
      std::memset(to, 0, some * value_dim * 4);
      return;
    }
    const int64_t p = position[token];
    kernels().attend({query.typed_data() + (token * heads + h) * key_dim,
                      key + row * key_dim * item, value + row * value_dim * item,
                      groups * key_dim * item, groups * value_dim * item, key_dim, value_dim, some,
                      span > 0 ? std::max<int64_t>(0, p - span + 1) : 0, p, bf16, scale, to});
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moejax

MOEJAX_HANDLER(moejax_rms_norm, moejax::RmsNorm,
               moejax::ffi::Ffi::Bind()
                   .Ctx<moejax::ffi::ThreadPool>()
                   .Arg<moejax::F32>()
                   .Arg<moejax::ffi::AnyBuffer>()
                   .Arg<moejax::S32>()
                   .Ret<moejax::F32>()
                   .Attr<float>("eps"));

MOEJAX_HANDLER(
    moejax_softmax, moejax::Softmax,
    moejax::ffi::Ffi::Bind().Ctx<moejax::ffi::ThreadPool>().Arg<moejax::F32>().Ret<moejax::F32>());

MOEJAX_HANDLER(moejax_attend, moejax::Attend,
               moejax::ffi::Ffi::Bind()
                   .Ctx<moejax::ffi::ThreadPool>()
                   .Arg<moejax::F32>()
                   .Arg<moejax::ffi::AnyBuffer>()
                   .Arg<moejax::ffi::AnyBuffer>()
                   .Arg<moejax::S32>()
                   .Arg<moejax::S32>()
                   .Arg<moejax::ffi::Buffer<moejax::ffi::PRED>>()
                   .Arg<moejax::S32>()
                   .Ret<moejax::F32>()
                   .Attr<float>("scale"));
