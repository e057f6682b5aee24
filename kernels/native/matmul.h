// Rows of weights times rows of activations.
//
// Every dot product is one 16-lane accumulator walked over the columns in order, then one fixed
// reduction: its bits depend on its two rows only, never on the tile, the batch or the thread.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace moejax {
namespace MOEJAX_ISA {
namespace {

// Rows of weights and of activations in registers at once, and columns per visit of a tile.
#if defined(__AVX512F__)
constexpr int kTileRows = 4, kTileTokens = 4;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kTileRows = 2, kTileTokens = 2;
#else
constexpr int kTileRows = 1, kTileTokens = 2;
#endif
constexpr int64_t kBlockCols = 1024;
// Bytes between a weight and the one prefetched with it; measured on cold memory.
constexpr int64_t kLongTile = 8192, kFarthest = 12288;

template <int M>
using Tile = F16[kTileRows][M];

template <int M>
MOEJAX_INLINE void clear(Tile<M>& acc) {
  MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) {
    MOEJAX_UNROLL for (int m = 0; m < M; ++m) acc[r][m] = splat(0.0f);
  }
}

template <int M>
MOEJAX_INLINE void step(const F16 (&w)[kTileRows], const float* const* x, int64_t j, Tile<M>& acc) {
  MOEJAX_UNROLL for (int m = 0; m < M; ++m) {
    F16 v = load(x[m] + j);
    MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) acc[r][m] = fma(w[r], v, acc[r][m]);
  }
}

// Each kind of weights offers, for kTileRows rows at once:
//   Activation        element type of packed activations
//   walk<M>           acc += rows * x[m] over columns [begin, end), from a multiple of a step
//   expand            f32 weights of columns [begin, end) into out[r][kBlockCols]
//   finish            the result of row r from its sum
struct Float32 {
  static constexpr int64_t kBytes = 4;
  static MOEJAX_INLINE F16 get(const uint8_t* at) {
    return load(reinterpret_cast<const float*>(at));
  }
};
struct Bfloat16 {
  static constexpr int64_t kBytes = 2;
  static MOEJAX_INLINE F16 get(const uint8_t* at) {
    return from_bf16(reinterpret_cast<const uint16_t*>(at));
  }
};
struct Int8 {
  static constexpr int64_t kBytes = 1;
  static MOEJAX_INLINE F16 get(const uint8_t* at) {
    return from_int8(reinterpret_cast<const int8_t*>(at));
  }
};

// Pointers to kTileRows rows from `first`; rows past the end repeat the last one.
struct RowPointers {
  const uint8_t* row[kTileRows];
  int64_t index[kTileRows];
  int64_t ahead;

  RowPointers(const Matrix& matrix, int64_t first, int64_t end) {
    const int64_t bytes = row_bytes(matrix.format, matrix.cols), tile = kTileRows * bytes;
    ahead = tile < kLongTile ? tile * 3 / 2 : tile * 3 / 4;
    if (ahead > kFarthest) ahead = kFarthest;
    for (int r = 0; r < kTileRows; ++r) {
      index[r] = first + r < end ? first + r : end - 1;
      row[r] = matrix.data + index[r] * bytes;
    }
  }

  // Fetches what a later step needs: rows are too short for the processor to see them coming.
  MOEJAX_INLINE void prefetch(int r, int64_t at) const {
    __builtin_prefetch(row[r] + at + ahead, 0, 3);
  }
};

template <class Element>
struct Dense : RowPointers {
  using Activation = float;
  static constexpr bool kExpands = true;
  int64_t whole;          // columns in full steps of 16
  const float* scales;
  uint8_t tail[kTileRows][16 * Element::kBytes];

  Dense(const Matrix& matrix, int64_t first, int64_t end)
      : RowPointers(matrix, first, end),
        whole(matrix.cols / 16 * 16),
        scales(reinterpret_cast<const float*>(matrix.data + matrix.scales_at())) {
    if (whole == matrix.cols) return;
    memset(tail, 0, sizeof tail);
    for (int r = 0; r < kTileRows; ++r) {
      memcpy(tail[r], row[r] + whole * Element::kBytes, (matrix.cols - whole) * Element::kBytes);
    }
  }

  template <int M>
  MOEJAX_INLINE void walk(const float* const* x, int64_t begin, int64_t end, Tile<M>& acc) const {
    constexpr int64_t line = 64 / Element::kBytes;  // columns of a cache line
    F16 w[kTileRows];
    const int64_t stop = end < whole ? end : whole;
    int64_t j = begin;
    for (; j + line <= stop; j += line) {
      MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) this->prefetch(r, j * Element::kBytes);
      MOEJAX_UNROLL for (int64_t i = j; i < j + line; i += 16) {
        MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) {
          w[r] = Element::get(row[r] + i * Element::kBytes);
        }
        step<M>(w, x, i, acc);
      }
    }
    for (; j < stop; j += 16) {
      MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) {
        w[r] = Element::get(row[r] + j * Element::kBytes);
      }
      step<M>(w, x, j, acc);
    }
    if (end <= whole) return;
    MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) w[r] = Element::get(tail[r]);
    step<M>(w, x, whole, acc);
  }

  void expand(int64_t begin, int64_t end, float (*out)[kBlockCols]) const {
    for (int r = 0; r < kTileRows; ++r) {
      for (int64_t j = begin; j < end; j += 16) {
        store(out[r] + j - begin, Element::get(j < whole ? row[r] + j * Element::kBytes : tail[r]));
      }
    }
  }

  MOEJAX_INLINE float finish(int r, float total) const {
    return Element::kBytes == 1 ? total * scales[index[r]] : total;
  }
};

template <int64_t kGroup>
struct Int4 : RowPointers {
  using Activation = float;
  static constexpr bool kExpands = true;
  static constexpr int64_t kGroups = kInt4Chunk / kGroup;  // per chunk
  const uint16_t* scale[kTileRows];

  Int4(const Matrix& matrix, int64_t first, int64_t end) : RowPointers(matrix, first, end) {
    const int64_t groups = round_up(matrix.cols, kInt4Chunk) / kGroup;
    auto* scales = reinterpret_cast<const uint16_t*>(matrix.data + matrix.scales_at());
    for (int r = 0; r < kTileRows; ++r) scale[r] = scales + index[r] * groups;
  }

  // Scales of the chunks [chunk, chunk + count) of every row; 16 scales at a time.
  MOEJAX_INLINE void scales_of(int64_t chunk, int64_t count, float (*out)[16]) const {
    for (int r = 0; r < kTileRows; ++r) {
      const uint16_t* from = scale[r] + chunk * kGroups;
#if defined(__AVX512F__)
      __mmask16 some = __mmask16((1u << (count * kGroups)) - 1);
      _mm512_storeu_ps(out[r], _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, from)));
#else
      for (int64_t i = 0; i < count * kGroups; ++i) out[r][i] = from_half(from[i]);
#endif
    }
  }

  template <class Visit>
  MOEJAX_INLINE void visit(int64_t begin, int64_t end, const Visit& use) const {
    constexpr int64_t batch = 16 / kGroups;
    constexpr int kPer = kGroup / 16;
    const int64_t stop = round_up(end, kInt4Chunk) / kInt4Chunk;
    for (int64_t first = begin / kInt4Chunk; first < stop; first += batch) {
      const int64_t count = stop - first < batch ? stop - first : batch;
      float scales[kTileRows][16];
      scales_of(first, count, scales);
      for (int64_t c = 0; c < count; ++c) {
        I16 words[kTileRows];
        MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) {
          words[r] = load_words(row[r] + (first + c) * 64);
          prefetch(r, (first + c) * 64);
        }
        MOEJAX_UNROLL for (int g = 0; g < kGroups; ++g) {
          F16 table[kTileRows], w[kTileRows];
          MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) {
            table[r] = int4_table(scales[r][c * kGroups + g]);
          }
          MOEJAX_UNROLL for (int i = 0; i < kPer; ++i) {
            const int k = g * kPer + i;
            MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) w[r] = nibble(words[r], k, table[r]);
            use(w, (first + c) * kInt4Chunk + 16 * k);
          }
        }
      }
    }
  }

  template <int M>
  MOEJAX_INLINE void walk(const float* const* x, int64_t begin, int64_t end, Tile<M>& acc) const {
    visit(begin, end, [&](const F16(&w)[kTileRows], int64_t j) __attribute__((always_inline)) {
      step<M>(w, x, j, acc);
    });
  }

  void expand(int64_t begin, int64_t end, float (*out)[kBlockCols]) const {
    visit(begin, end, [&](const F16(&w)[kTileRows], int64_t j) __attribute__((always_inline)) {
      for (int r = 0; r < kTileRows; ++r) store(out[r] + j - begin, w[r]);
    });
  }

  MOEJAX_INLINE float finish(int, float total) const { return total; }
};

#if defined(__AVX512BF16__)
// Both sides in bf16: two products per lane and instruction, denormals taken as zero.
struct Bfloat16Pairs : RowPointers {
  using Activation = uint16_t;
  static constexpr bool kExpands = false;
  int64_t whole;  // columns in full steps of 32
  uint16_t tail[kTileRows][32];

  Bfloat16Pairs(const Matrix& matrix, int64_t first, int64_t end)
      : RowPointers(matrix, first, end), whole(matrix.cols / 32 * 32) {
    if (whole == matrix.cols) return;
    memset(tail, 0, sizeof tail);
    for (int r = 0; r < kTileRows; ++r) {
      memcpy(tail[r], row[r] + whole * 2, (matrix.cols - whole) * 2);
    }
  }

  template <int M>
  static MOEJAX_INLINE void pairs(const void* const (&w)[kTileRows], const uint16_t* const* x,
                                  int64_t j, Tile<M>& acc) {
    __m512i row[kTileRows];
    MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) row[r] = _mm512_loadu_si512(w[r]);
    MOEJAX_UNROLL for (int m = 0; m < M; ++m) {
      __m512i v = _mm512_loadu_si512(x[m] + j);
      MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) {
        auto& sum = acc[r][m].p[0];
        sum = (Vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)row[r], (__m512bh)v);
      }
    }
  }

  template <int M>
  MOEJAX_INLINE void walk(const uint16_t* const* x, int64_t begin, int64_t end,
                          Tile<M>& acc) const {
    const void* w[kTileRows];
    const int64_t stop = end < whole ? end : whole;
    for (int64_t j = begin; j < stop; j += 32) {
      MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) {
        w[r] = row[r] + 2 * j;
        prefetch(r, 2 * j);
      }
      pairs<M>(w, x, j, acc);
    }
    if (end <= whole) return;
    MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) w[r] = tail[r];
    pairs<M>(w, x, whole, acc);
  }

  MOEJAX_INLINE float finish(int, float total) const { return total; }
};
#endif

// f32 weights that `expand` left in a block.
struct Expanded {
  const float (*row)[kBlockCols];

  template <int M>
  MOEJAX_INLINE void walk(const float* const* x, int64_t begin, int64_t end, Tile<M>& acc) const {
    for (int64_t j = begin; j < end; j += 16) {
      F16 w[kTileRows];
      MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) w[r] = load(row[r] + j - begin);
      step<M>(w, x, j, acc);
    }
  }
};

template <int M, class Rows, class X>
void tile(const Rows& rows, const X* const* x, int64_t cols, int64_t first, int64_t end,
          float* const* y) {
  Tile<M> acc;
  clear<M>(acc);
  rows.template walk<M>(x, 0, cols, acc);
  for (int r = 0; r < kTileRows && first + r < end; ++r) {
    for (int m = 0; m < M; ++m) y[m][first + r] = rows.finish(r, sum(acc[r][m]));
  }
}

// `tile` for as many activation rows as fit one tile.
template <class Rows, class X>
MOEJAX_INLINE void few(const Rows& rows, const X* const* x, int64_t count, int64_t cols,
                       int64_t first, int64_t end, float* const* y) {
  if (count == 1) tile<1>(rows, x, cols, first, end, y);
  if (count == 2) tile<2>(rows, x, cols, first, end, y);
  if constexpr (kTileTokens > 2) {
    if (count == 3) tile<3>(rows, x, cols, first, end, y);
    if (count == 4) tile<4>(rows, x, cols, first, end, y);
  }
}

// One tile over the columns [begin, end), its sums kept in memory in between.
template <int M, class Rows, class X>
void resume(const Rows& rows, const X* const* x, int64_t begin, int64_t end,
            float (*sums)[kTileRows][16]) {
  Tile<M> acc;
  MOEJAX_UNROLL for (int m = 0; m < M; ++m) {
    MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) acc[r][m] = load(sums[m][r]);
  }
  rows.template walk<M>(x, begin, end, acc);
  MOEJAX_UNROLL for (int m = 0; m < M; ++m) {
    MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) store(sums[m][r], acc[r][m]);
  }
}

template <class Rows, class X>
void resume_all(const Rows& rows, const X* const* x, int64_t count, int64_t begin, int64_t end,
                float (*sums)[kTileRows][16]) {
  int64_t m = 0;
  for (; m + kTileTokens <= count; m += kTileTokens) {
    resume<kTileTokens>(rows, x + m, begin, end, sums + m);
  }
  if constexpr (kTileTokens > 3) {
    if (count - m == 3) return resume<3>(rows, x + m, begin, end, sums + m);
  }
  if constexpr (kTileTokens > 2) {
    if (count - m == 2) return resume<2>(rows, x + m, begin, end, sums + m);
  }
  if (count - m == 1) resume<1>(rows, x + m, begin, end, sums + m);
}

template <class Rows>
void multiply_rows(const Matrix& matrix, int64_t row0, int64_t row1, const void* const* packed,
                   int64_t count, float* const* y) {
  using X = typename Rows::Activation;
  auto* x = reinterpret_cast<const X* const*>(packed);
  const int64_t cols = matrix.cols;
  alignas(64) float sums[kBlockRows][kTileRows][16];
  alignas(64) float block[kTileRows][kBlockCols];
  for (int64_t first = row0; first < row1; first += kTileRows) {
    const Rows rows(matrix, first, row1);
    if (count <= kTileTokens) {
      few(rows, x, count, cols, first, row1, y);
      continue;
    }
    memset(sums, 0, count * sizeof sums[0]);
    for (int64_t begin = 0; begin < cols; begin += kBlockCols) {
      const int64_t end = begin + kBlockCols < cols ? begin + kBlockCols : cols;
      if constexpr (Rows::kExpands) {
        rows.expand(begin, end, block);
        resume_all(Expanded{block}, x, count, begin, end, sums);
      } else {
        resume_all(rows, x, count, begin, end, sums);
      }
    }
    for (int r = 0; r < kTileRows && first + r < row1; ++r) {
      for (int64_t m = 0; m < count; ++m) y[m][first + r] = rows.finish(r, sum(load(sums[m][r])));
    }
  }
}

}  // namespace
}  // namespace MOEJAX_ISA
}  // namespace moejax
