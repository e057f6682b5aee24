// How the handlers cut work into chunks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "parallel.h"

namespace moejax {

constexpr int64_t kChunkBytes = 64 << 10;  // of weights: stays in a core's cache between blocks
constexpr int64_t kSmallBytes = 96 << 10;  // below this, waking another thread costs more

// `bytes` of weights for `count` activation rows; arithmetic outweighs reading from a few rows on.
inline bool is_small(int64_t bytes, int64_t count) {
  return bytes * std::max<int64_t>(1, count / 4) < kSmallBytes;
}

// Rows of weights per task.
inline int64_t chunk_rows(const Matrix& matrix, int64_t count) {
  const int64_t per_row = std::max<int64_t>(1, row_bytes(matrix.format, matrix.cols));
  const int64_t bytes = count > kBlockRows ? kChunkBytes / 2 : kChunkBytes;
  return std::clamp<int64_t>(bytes / per_row / 16 * 16, 16, std::max<int64_t>(16, matrix.rows));
}

inline void pack_rows(xla::ffi::ThreadPool& pool, const Kernels& k, const float* x, int64_t count,
                      int64_t cols, bool round, uint8_t* packed) {
  const int64_t stride = k.packed_bytes(cols, round), some = 8;
  parallel_for(pool, (count + some - 1) / some, count * cols * 4 < 4 * kSmallBytes, [&](int64_t i) {
    for (int64_t n = i * some; n < std::min(count, (i + 1) * some); ++n) {
      k.pack(x + n * cols, cols, round, packed + n * stride, 0);
      k.pad(packed + n * stride, cols, round);
    }
  });
}

}  // namespace moejax
