// How the handlers cut work into chunks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace moejax {

// Bytes of weights per task. Long tasks read faster, since the first rows of each come unannounced;
// short ones at the end let all threads finish together, and stay in a core's cache between blocks.
constexpr int64_t kLeastBytes = 32 << 10, kMostBytes = 512 << 10;
constexpr int64_t kSmallBytes = 96 << 10;  // below this, waking another thread costs more

// `bytes` of weights for `count` activation rows; arithmetic outweighs reading from a few rows on.
inline bool is_small(int64_t bytes, int64_t count) {
  return bytes * std::max<int64_t>(1, count / 4) < kSmallBytes;
}

struct Task {
  int64_t matrix, row0, row1;
};

// Cuts `matrices` like this one, for `count` activation rows each, into tasks of at most `most`
// rows in falling sizes.
inline std::vector<Task> cut(const Matrix& matrix, int64_t matrices, int64_t count, int64_t threads,
                             int64_t most) {
  const int64_t per_row = std::max<int64_t>(1, row_bytes(matrix.format, matrix.cols));
  std::vector<Task> tasks;
  int64_t left = matrices * matrix.rows;
  for (int64_t m = 0; m < matrices; ++m) {
    for (int64_t row = 0; row < matrix.rows;) {
      const int64_t share = left * per_row / (2 * std::max<int64_t>(1, threads));
      const int64_t bytes =
          count > kBlockRows ? kLeastBytes : std::clamp(share, kLeastBytes, kMostBytes);
      const int64_t top = std::max<int64_t>(16, most);
      const int64_t some = std::clamp<int64_t>(bytes / per_row / 16 * 16, 16, top);
      const int64_t end = std::min(matrix.rows, row + some);
      tasks.push_back({m, row, end});
      left -= end - row;
      row = end;
    }
  }
  return tasks;
}

template <class Pool>
void pack_rows(Pool& pool, const Kernels& k, const float* x, int64_t count, int64_t cols,
               Packing packing, uint8_t* packed) {
  const int64_t stride = k.packed_bytes(cols, packing), some = 8;
  parallel_for(pool, (count + some - 1) / some, count * cols * 4 < 4 * kSmallBytes, [&](int64_t i) {
    for (int64_t n = i * some; n < std::min(count, (i + 1) * some); ++n) {
      k.pack(x + n * cols, cols, packing, packed + n * stride);
    }
  });
}

}  // namespace moejax
