// y = x W^T for one layer of a stack of weight matrices.
#include <algorithm>
#include <string>
#include <vector>

#include "handlers.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "work.h"

namespace moejax {
namespace {

ffi::Error Linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer bits,
                  ffi::Buffer<ffi::S32> layer, ffi::ResultBuffer<ffi::F32> y, int64_t rows,
                  int64_t cols, int64_t format, bool round_input) {
  const auto shape = bits.dimensions();
  const int64_t layers = shape.size() ? shape[0] : 0;
  const int64_t at = *layer.typed_data();
  if (at < 0 || at >= layers) {
    return ffi::Error::InvalidArgument("moejax_linear: layer " + std::to_string(at) +
                                       " of a stack of " + std::to_string(layers));
  }
  const int64_t stride = static_cast<int64_t>(bits.size_bytes()) / layers;
  const auto* data = static_cast<const uint8_t*>(bits.untyped_data()) + at * stride;
  const Matrix matrix{data, rows, cols, static_cast<Format>(format)};
  if (matrix.bytes() > stride) {
    return ffi::Error::InvalidArgument("moejax_linear: a layer of " + std::to_string(stride) +
                                       " bytes is too short for its matrix");
  }
  const int64_t count = rows ? static_cast<int64_t>(y->element_count()) / rows : 0;
  const Kernels& k = kernels();
  const Packing packing = k.packing(matrix.format, cols, round_input);
  const int64_t packed = k.packed_bytes(cols, packing);
  Scratch memory = scratch(count * packed);
  pack_rows(pool, k, x.typed_data(), count, cols, packing, memory.get());
  float* out = y->typed_data();
  const auto tasks = cut(matrix, 1, count, pool.num_threads(), rows);
  const bool small = is_small(rows * row_bytes(matrix.format, cols), count);
  parallel_for(pool, static_cast<int64_t>(tasks.size()), small, [&](int64_t i) {
    const int64_t row0 = tasks[i].row0, row1 = tasks[i].row1;
    const void* from[kBlockRows];
    float* to[kBlockRows];
    for (int64_t n = 0; n < count; n += kBlockRows) {
      const int64_t some = std::min(kBlockRows, count - n);
      for (int64_t m = 0; m < some; ++m) {
        from[m] = memory.get() + (n + m) * packed;
        to[m] = out + (n + m) * rows;
      }
      k.multiply(matrix, packing, row0, row1, from, some, to);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moejax

MOEJAX_HANDLER(moejax_linear, moejax::Linear,
               moejax::ffi::Ffi::Bind()
                   .Ctx<moejax::ffi::ThreadPool>()
                   .Arg<moejax::ffi::Buffer<moejax::ffi::F32>>()
                   .Arg<moejax::ffi::AnyBuffer>()
                   .Arg<moejax::ffi::Buffer<moejax::ffi::S32>>()
                   .Ret<moejax::ffi::Buffer<moejax::ffi::F32>>()
                   .Attr<int64_t>("rows")
                   .Attr<int64_t>("cols")
                   .Attr<int64_t>("format")
                   .Attr<bool>("round_input"));
