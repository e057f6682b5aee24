// int4 by the digits of fixed.h on AMX tiles, 16 rows of activations at once: the same integers,
// and the same few operations on floats, as Int4Rows.
#pragma once

#include "tiles.h"

namespace moejax {
namespace MOEJAX_ISA {
namespace {

constexpr int64_t kTokens = 16;                         // of a tile
constexpr int64_t kMostTiles = kBlockRows / kTokens;
constexpr int64_t kGroupsOf = 4;                        // groups of 32 columns in a chunk

// Sums by digit in 0 to 2, weights of a group in 4, its activations in 6 and 7.
inline TileShapes int4_shapes() {
  TileShapes all;
  for (int t = 0; t < 8; ++t) {
    all.rows[t] = t > 5 ? 8 : 16;
    all.bytes[t] = t == 4 ? 32 : kTileRow;
  }
  return all;
}

// Activations by chunk, digit and half, transposed: the eight words of group b lie at
// `tile(t, chunk, digit) + 64 b`, 256 bytes apart. Rows that are absent repeat another.
struct Int4Columns {
  int64_t chunks, tiles;
  uint8_t* digits_;
  int32_t* offsets_;  // [tile, chunk, group, row], negative

  Int4Columns(const void* const* x, int64_t count, int64_t cols)
      : chunks(round_up(cols, kInt4Chunk) / kInt4Chunk), tiles((count + kTokens - 1) / kTokens) {
    const int64_t bytes = tiles * chunks * kDigits * 2 * kTileBytes;
    digits_ = room(bytes + tiles * chunks * kGroupsOf * kTileRow);
    offsets_ = reinterpret_cast<int32_t*>(digits_ + bytes);
    for (int64_t t = 0; t < tiles; ++t) {
      const void* row[kTokens];
      for (int64_t i = 0; i < kTokens; ++i) {
        row[i] = x[kTokens * t + (kTokens * t + i < count ? i : 0)];
      }
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int64_t d = 0; d < kDigits; ++d) {
          for (int64_t half = 0; half < 2; ++half) {
            __m512i word[16];
            MOEJAX_UNROLL for (int i = 0; i < 16; ++i) {
              word[i] = _mm512_load_si512(digits(row[i]) +
                                          ((2 * chunk + half) * kDigits + d) * kBlock);
            }
            transpose(word);
            uint8_t* to = at(t, chunk, d) + half * kTileBytes;
            MOEJAX_UNROLL for (int i = 0; i < 16; ++i) {
              _mm512_store_si512(to + kTileRow * i, word[i]);
            }
          }
        }
        for (int64_t i = 0; i < kTokens * kGroupsOf; ++i) {
          offset(t, chunk)[i] = -offsets(row[i % kTokens], cols)[4 * chunk + i / kTokens];
        }
      }
    }
  }

  MOEJAX_INLINE uint8_t* at(int64_t t, int64_t chunk, int64_t digit) const {
    return digits_ + ((t * chunks + chunk) * kDigits + digit) * 2 * kTileBytes;
  }
  MOEJAX_INLINE int32_t* offset(int64_t t, int64_t chunk) const {
    return offsets_ + (t * chunks + chunk) * kGroupsOf * kTokens;
  }
};

// Weights of a chunk of 16 rows as bytes: group b of row r lies at
// out + 1024 (b / 2) + 64 r + 32 (b % 2).
MOEJAX_INLINE void nibbles_of(const uint8_t* const* row, int64_t chunk, uint8_t* out) {
  const __m512i low = _mm512_set1_epi8(15);
  // Byte b of each word belongs to group b; the bytes of a group, in quarter b.
  const __m512i by_group = _mm512_add_epi8(
      _mm512_broadcast_i32x4(
          _mm_setr_epi8(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60)),
      _mm512_setr_epi32(0, 0, 0, 0, 0x01010101, 0x01010101, 0x01010101, 0x01010101, 0x02020202,
                        0x02020202, 0x02020202, 0x02020202, 0x03030303, 0x03030303, 0x03030303,
                        0x03030303));
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int64_t r = 0; r < 16; ++r) {
    const __m512i both = _mm512_loadu_si512(row[r] + 64 * chunk);
    const __m512i even = _mm512_permutexvar_epi8(by_group, _mm512_and_si512(both, low));
    const __m512i odd = _mm512_permutexvar_epi8(
        by_group, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    _mm512_store_si512(out + kTileRow * r, _mm512_permutex2var_epi64(even, first, odd));
    _mm512_store_si512(out + kTileBytes + kTileRow * r,
                       _mm512_permutex2var_epi64(even, second, odd));
  }
}

using Int4Sums = float[kMostTiles][kGroupsOf][16][kTokens];

using Int4Digits = int32_t[kDigits][16][kTokens];

MOEJAX_INLINE void multiply_group(const uint8_t* weights, const Int4Columns& columns, int64_t t,
                                  int64_t chunk, int64_t b, Int4Digits& out) {
  const uint8_t* from = columns.at(t, chunk, 0) + kTileRow * b;
  tile_load<4>(weights + kTileBytes * (b / 2) + 32 * (b % 2), kTileRow);
  tile_zero<0>();
  tile_load<6>(from, 4 * kTileRow);
  multiply_unsigned<0, 4, 6>();
  tile_zero<1>();
  tile_load<7>(from + 2 * kTileBytes, 4 * kTileRow);
  multiply_unsigned<1, 4, 7>();
  tile_load<2>(columns.offset(t, chunk) + kTokens * b, 0);
  tile_load<6>(from + 4 * kTileBytes, 4 * kTileRow);
  multiply_unsigned<2, 4, 6>();
  tile_store<0>(out[0], kTileRow);
  tile_store<1>(out[1], kTileRow);
  tile_store<2>(out[2], kTileRow);
}

MOEJAX_INLINE void add_group(const Int4Digits& digit, const float (*scale)[kGroupsOf], int64_t b,
                             float (*sum)[kTokens]) {
  MOEJAX_UNROLL for (int64_t r = 0; r < 16; ++r) {
    __m512i whole = _mm512_slli_epi32(_mm512_load_si512(digit[0][r]), 8);
    whole = _mm512_slli_epi32(_mm512_add_epi32(whole, _mm512_load_si512(digit[1][r])), 8);
    whole = _mm512_add_epi32(whole, _mm512_load_si512(digit[2][r]));
    _mm512_store_ps(sum[r], _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(scale[r][b]),
                                            _mm512_load_ps(sum[r])));
  }
}

// Adds a chunk of 16 rows. Vectors work on one group while tiles multiply the next.
MOEJAX_INLINE void add_chunk(const uint8_t* weights, const Int4Columns& columns, int64_t chunk,
                             const float (*scale)[kGroupsOf], Int4Sums& sums) {
  alignas(64) Int4Digits digit[2];
  const int64_t count = kGroupsOf * columns.tiles;
  for (int64_t i = 0; i <= count; ++i) {
    const int64_t last = i - 1;
    if (i < count) {
      multiply_group(weights, columns, i / kGroupsOf, chunk, i % kGroupsOf, digit[i % 2]);
    }
    if (last >= 0) {
      const int64_t b = last % kGroupsOf;
      add_group(digit[last % 2], scale, b, sums[last / kGroupsOf][b]);
    }
  }
}

void tiles_int4(const Matrix& matrix, int64_t row0, int64_t row1, const void* const* x,
                int64_t count, float* const* y) {
  const Int4Columns columns(x, count, matrix.cols);
  const InUse tiles(int4_shapes());
  const int64_t stride = row_bytes(matrix.format, matrix.cols);
  const int64_t group = group_of(matrix.format), per_chunk = kInt4Chunk / group;
  const auto* scales = reinterpret_cast<const uint16_t*>(matrix.data + matrix.scales_at());
  alignas(64) Int4Sums sums;
  alignas(64) uint8_t weights[2 * kTileBytes];
  for (int64_t first = row0; first < row1; first += 16) {
    const uint8_t* row[16];
    const uint16_t* half[16];
    for (int64_t r = 0; r < 16; ++r) {  // rows past the end repeat the last one
      const int64_t index = first + r < row1 ? first + r : row1 - 1;
      row[r] = matrix.data + index * stride;
      half[r] = scales + index * columns.chunks * per_chunk;
    }
    memset(sums, 0, size_t(columns.tiles) * sizeof sums[0]);
    for (int64_t chunk = 0; chunk < columns.chunks; ++chunk) {
      float scale[16][kGroupsOf];
      for (int64_t r = 0; r < 16; ++r) {
        for (int64_t b = 0; b < kGroupsOf; ++b) {
          scale[r][b] = from_half(half[r][per_chunk * chunk + 32 * b / group]);
        }
      }
      nibbles_of(row, chunk, weights);
      add_chunk(weights, columns, chunk, scale, sums);
    }
    for (int64_t m = 0; m < count; ++m) {
      const auto& part = sums[m / kTokens];
      for (int64_t r = 0; r < 16 && first + r < row1; ++r) {
        const int64_t i = m % kTokens;
        const float whole = (part[0][r][i] + part[2][r][i]) + (part[1][r][i] + part[3][r][i]);
        y[m][first + r] = float(double(whole) * header(x[m]).scale);
      }
    }
  }
}

}  // namespace
}  // namespace MOEJAX_ISA
}  // namespace moejax
