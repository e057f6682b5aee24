// Products on AMX tiles: int8 by the digits of fixed.h, whose sums are exact, and bf16 by bf16.
//
// A processor adds the products of bf16 in an order of its own, 32 columns at once, whatever the
// number of rows. So rows of activations do not depend on one another here either, but their bits
// are not those of matmul.h: bf16 takes tiles for one row as for many, or not at all.
#pragma once

#include <stdio.h>
#include <stdlib.h>

#include "fixed.h"
#include "kernels.h"
#include "simd.h"

namespace moejax {
namespace MOEJAX_ISA {
namespace {

constexpr int64_t kTileBytes = 1024, kTileRow = 64;
constexpr int64_t kMostColumns = kDigits * kBlockRows;

template <int kTile>
MOEJAX_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(stride) : "memory");
}

template <int kTile>
MOEJAX_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(stride) : "memory");
}

template <int kTile>
MOEJAX_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

struct Int8Tiles {
  static constexpr int64_t kCols = 64;  // of weights in a tile
  template <int kSum, int kA, int kB>
  static MOEJAX_INLINE void multiply() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }
};

#if defined(__AMX_BF16__)
struct Bfloat16Tiles {
  static constexpr int64_t kCols = 32;
  template <int kSum, int kA, int kB>
  static MOEJAX_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }
};
#endif

// unsigned by signed bytes
template <int kSum, int kA, int kB>
MOEJAX_INLINE void multiply_unsigned() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

// The tiles of this thread while it lives.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};
};

class InUse {
 public:
  explicit InUse(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
  ~InUse() { asm volatile("tilerelease"); }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;
};

// Sums in 0 to 3, weights in 4 and 5, activations in 6 and 7.
inline TileShapes shapes_of(int64_t rows, int64_t columns) {
  TileShapes all;
  for (int t = 0; t < 8; ++t) {
    all.rows[t] = uint8_t(t < 6 ? rows : 16);
    all.bytes[t] = uint16_t(t == 4 || t == 5 ? kTileRow : 4 * columns);
  }
  return all;
}

// Memory of a thread that stays from call to call.
class Room {
 public:
  uint8_t* of(int64_t bytes) {
    if (bytes > size_) {
      free(memory_);
      void* got = nullptr;
      if (posix_memalign(&got, 64, size_t(bytes))) {
        fprintf(stderr, "moejax: no memory for %lld bytes of activations\n", (long long)bytes);
        abort();
      }
      memory_ = static_cast<uint8_t*>(got);
      size_ = bytes;
    }
    return memory_;
  }
  ~Room() { free(memory_); }

 private:
  uint8_t* memory_ = nullptr;
  int64_t size_ = 0;
};

MOEJAX_INLINE uint8_t* room(int64_t bytes) {
  static thread_local Room mine;
  return mine.of(bytes);
}

// 16 x 16 words, transposed.
MOEJAX_INLINE void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  MOEJAX_UNROLL for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  MOEJAX_UNROLL for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  MOEJAX_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  MOEJAX_UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Activations as tiles: 16 columns in each, or the only one where it lies.
struct Columns {
  int64_t count, tiles;
  const uint8_t* data;
  int64_t stride, pace, group;  // bytes from row to row, tile to tile, 16 columns to the next

  // Columns that are absent repeat another.
  Columns(const uint8_t* const* column, int64_t columns, int64_t tiles_each, int64_t step)
      : count(columns), tiles(tiles_each), data(column[0]), stride(4), pace(step), group(0) {
    if (count == 1) return;
    stride = kTileRow;
    pace = kTileBytes;
    group = tiles * kTileBytes;
    uint8_t* out = room((count + 15) / 16 * group);
    data = out;
    for (int64_t first = 0; first < count; first += 16) {
      const int64_t some = count - first < 16 ? count - first : 16;
      for (int64_t k = 0; k < tiles; ++k, out += kTileBytes) {
        __m512i word[16];
        MOEJAX_UNROLL for (int i = 0; i < 16; ++i) {
          word[i] = _mm512_loadu_si512(column[first + (i < some ? i : 0)] + step * k);
        }
        transpose(word);
        MOEJAX_UNROLL for (int i = 0; i < 16; ++i) _mm512_store_si512(out + kTileRow * i, word[i]);
      }
    }
  }
};

// Rows of weights as tiles. Columns behind the last are zero.
struct TileRows {
  const uint8_t* row;
  int64_t stride, whole;  // bytes from row to row; tiles without a column behind the last
  bool ragged;
  alignas(64) uint8_t tail[2][kTileBytes];

  TileRows(const Matrix& matrix, int64_t first, int64_t rows, int64_t width)
      : stride(row_bytes(matrix.format, matrix.cols)), whole(matrix.cols / width),
        ragged(matrix.cols % width) {
    row = matrix.data + first * stride;
    if (!ragged) return;
    memset(tail, 0, sizeof tail);
    for (int64_t r = 0; r < rows; ++r) {
      memcpy(tail[r / 16] + r % 16 * kTileRow, row + r * stride + whole * kTileRow,
             stride - whole * kTileRow);
    }
  }
};

// Sums of 16 R rows with 16 N columns of activations, into out[r * N + n] as they lie in tiles.
template <class Tiles, int R, int N>
void walk(const TileRows& rows, const Columns& columns, int64_t first,
          uint8_t (*out)[kTileBytes]) {
  const uint8_t* b = columns.data + first / 16 * columns.group;
  tile_zero<0>();
  if constexpr (R * N > 1) tile_zero<1>();
  if constexpr (R * N > 2) tile_zero<2>(), tile_zero<3>();
  for (int64_t k = 0; k < columns.tiles; ++k, b += columns.pace) {
    if (k < rows.whole) {
      tile_load<4>(rows.row + kTileRow * k, rows.stride);
      if constexpr (R > 1) tile_load<5>(rows.row + 16 * rows.stride + kTileRow * k, rows.stride);
    } else {
      tile_load<4>(rows.tail[0], kTileRow);
      if constexpr (R > 1) tile_load<5>(rows.tail[1], kTileRow);
    }
    tile_load<6>(b, columns.stride);
    Tiles::template multiply<0, 4, 6>();
    if constexpr (R > 1) Tiles::template multiply<N, 5, 6>();
    if constexpr (N > 1) {
      tile_load<7>(b + columns.group, columns.stride);
      Tiles::template multiply<1, 4, 7>();
      if constexpr (R > 1) Tiles::template multiply<N + 1, 5, 7>();
    }
  }
  tile_store<0>(out[0], kTileRow);
  if constexpr (R * N > 1) tile_store<1>(out[1], kTileRow);
  if constexpr (R * N > 2) tile_store<2>(out[2], kTileRow), tile_store<3>(out[3], kTileRow);
}

using Sums = int32_t[kMostColumns][32];  // words of each column of activations, by row

template <class Tiles, int R>
void rows_of(const TileRows& rows, const Columns& columns, Sums& sums) {
  alignas(64) uint8_t tile[4][kTileBytes];
  for (int64_t first = 0; first < columns.count; first += 32) {
    const int64_t n = columns.count - first > 16 ? 2 : 1;
    if (n == 2) walk<Tiles, R, 2>(rows, columns, first, tile);
    if (n == 1) walk<Tiles, R, 1>(rows, columns, first, tile);
    for (int64_t i = 0; i < R * n; ++i) {
      __m512i word[16];
      MOEJAX_UNROLL for (int j = 0; j < 16; ++j) {
        word[j] = _mm512_load_si512(tile[i] + kTileRow * j);
      }
      transpose(word);
      int32_t* to = sums[first + 16 * (i % n)] + 16 * (i / n);
      MOEJAX_UNROLL for (int j = 0; j < 16; ++j) _mm512_storeu_si512(to + 32 * j, word[j]);
    }
  }
}

// Calls use(first row of the sums, begin, end) for the rows [row0, row1).
template <class Tiles, class Use>
void multiply_columns(const Matrix& matrix, int64_t row0, int64_t row1,
                      const uint8_t* const* column, int64_t count, int64_t pace, Sums& sums,
                      const Use& use) {
  const Columns columns(column, count, (matrix.cols + Tiles::kCols - 1) / Tiles::kCols, pace);
  const int64_t height = matrix.rows < 16 ? matrix.rows : 16;
  const InUse tiles(shapes_of(height, count == 1 ? 1 : 16));
  for (int64_t first = row0; first < row1;) {
    const int64_t reach = matrix.rows >= 32 && row1 - first > 16 ? 32 : height;
    // The last tile begins earlier rather than reach beyond the matrix: the bits are the same.
    const int64_t start = first + reach > matrix.rows ? matrix.rows - reach : first;
    const TileRows rows(matrix, start, reach, Tiles::kCols);
    if (reach == 32) rows_of<Tiles, 2>(rows, columns, sums);
    if (reach < 32) rows_of<Tiles, 1>(rows, columns, sums);
    const int64_t end = start + reach < row1 ? start + reach : row1;
    use(start, first, end);
    first = end;
  }
}

#if defined(__AMX_BF16__)
void tiles_bfloat16(const Matrix& matrix, int64_t row0, int64_t row1, const void* const* x,
                    int64_t count, float* const* y) {
  alignas(64) Sums sums;
  const uint8_t* column[kBlockRows];
  for (int64_t m = 0; m < count; ++m) column[m] = static_cast<const uint8_t*>(x[m]);
  multiply_columns<Bfloat16Tiles>(
      matrix, row0, row1, column, count, kTileRow, sums,
      [&](int64_t start, int64_t begin, int64_t end) {
        for (int64_t m = 0; m < count; ++m) {
          memcpy(y[m] + begin, sums[m] + (begin - start), 4 * (end - begin));
        }
      });
}
#endif

void tiles_int8(const Matrix& matrix, int64_t row0, int64_t row1, const void* const* x,
                int64_t count, float* const* y) {
  alignas(64) Sums sums;
  const uint8_t* column[kMostColumns];
  for (int64_t i = 0; i < kDigits * count; ++i) {
    column[i] = digits(x[i / kDigits]) + i % kDigits * kBlock;
  }
  const auto* scales = reinterpret_cast<const float*>(matrix.data + matrix.scales_at());
  multiply_columns<Int8Tiles>(
      matrix, row0, row1, column, kDigits * count, kDigits * kBlock, sums,
      [&](int64_t start, int64_t begin, int64_t end) {
        for (int64_t m = 0; m < count; ++m) {
          const auto* digit = sums + kDigits * m;
          for (int64_t r = begin; r < end; ++r) {
            const double whole = 65536.0 * digit[0][r - start] + 256.0 * digit[1][r - start] +
                                 digit[2][r - start];
            y[m][r] = float(whole * header(x[m]).scale * double(scales[r]));
          }
        }
      });
}

}  // namespace
}  // namespace MOEJAX_ISA
}  // namespace moejax
