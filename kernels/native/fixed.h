// Integer weights times activations in fixed point.
//
// An activation is an integer of up to 2^22 times a power of two that its whole row shares, and the
// integer is three signed digits of 8 bits. Sums of products of integers are exact, so they have
// no order: rows, threads and tiles cannot change a bit. What is lost is what lies more than 22
// bits below the largest activation of the row. A row with an infinity or a NaN stays in f32.
#pragma once

#include <math.h>

#include "kernels.h"
#include "matmul.h"
#include "simd.h"

namespace moejax {
namespace MOEJAX_ISA {
namespace {

constexpr int kDigits = 3;
constexpr int64_t kBlock = 64;          // columns of one digit in a register
constexpr int64_t kFixedCols = 1 << 16;  // beyond, sums might not fit 32 bits

// A packed row: this, the digits of each block of columns, and for int4 the offset of each group;
// f32 instead if not finite.
struct alignas(64) Fixed {
  double scale;   // of the integers
  double total;   // their sum
  bool finite;
};

constexpr int64_t fixed_blocks(int64_t cols) { return round_up(cols, kInt4Chunk) / kBlock; }

constexpr int64_t fixed_bytes(int64_t cols) {
  return int64_t{sizeof(Fixed)} + fixed_blocks(cols) * kBlock * 4;  // digits and offsets take less
}

MOEJAX_INLINE const Fixed& header(const void* row) { return *static_cast<const Fixed*>(row); }
MOEJAX_INLINE const uint8_t* digits(const void* row) {
  return static_cast<const uint8_t*>(row) + sizeof(Fixed);
}
// Of each chunk of int4: eight times the sums of its four groups of 32 columns.
MOEJAX_INLINE const int32_t* offsets(const void* row, int64_t cols) {
  return reinterpret_cast<const int32_t*>(digits(row) + fixed_blocks(cols) * kBlock * kDigits);
}

// Where the bytes of a half chunk of int4 lie once `regroup` has put those of a group together:
// quarter l, group b, byte c is column 32 b + 16 half + 4 l + c.
constexpr int64_t grouped_column(int64_t half, int64_t at) {
  return 32 * (at / 4 % 4) + 16 * half + 4 * (at / 16) + at % 4;
}

// The largest magnitude of x, or infinity if one of them is not finite.
inline float largest(const float* x, int64_t count) {
  const __m512 odd = _mm512_set1_ps(INFINITY);
  __m512 top = _mm512_setzero_ps();
  __mmask16 wrong = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const auto some = __mmask16(count - i < 16 ? (1u << (count - i)) - 1 : 0xffffu);
    const __m512 value = _mm512_abs_ps(_mm512_maskz_loadu_ps(some, x + i));
    wrong |= _mm512_cmp_ps_mask(value, odd, _CMP_NLT_UQ);
    top = _mm512_max_ps(top, value);
  }
  return wrong ? INFINITY : _mm512_reduce_max_ps(top);
}

// The digits of 16 integers, of the highest first.
MOEJAX_INLINE void cut_digits(__m512i n, __m128i (&out)[kDigits]) {
  for (int d = kDigits - 1; d >= 0; --d) {
    out[d] = _mm512_cvtepi32_epi8(n);  // the low byte, as a signed number
    n = _mm512_srai_epi32(_mm512_sub_epi32(n, _mm512_cvtepi8_epi32(out[d])), 8);
  }
}

// x[0, cols) as a packed row for int8, or with `grouped` for int4.
inline void pack_fixed(const float* x, int64_t cols, bool grouped, void* row) {
  auto& head = *static_cast<Fixed*>(row);
  auto* to = static_cast<uint8_t*>(row) + sizeof(Fixed);
  const float top = largest(x, cols);
  head.finite = top < INFINITY;
  const int64_t blocks = fixed_blocks(cols), padded = blocks * kBlock;
  if (!head.finite) {
    memcpy(to, x, 4 * cols);
    memset(to + 4 * cols, 0, 4 * (padded - cols));
    return;
  }
  // 2^22 is more than the largest integer, and 2^127 the largest factor.
  int exponent = 0;
  frexpf(top, &exponent);
  const int shift = top > 0 && 22 - exponent < 127 ? 22 - exponent : 127;
  const __m512 factor = _mm512_set1_ps(ldexpf(1.0f, shift));
  head.scale = ldexp(1.0, -shift);
  auto* sums = reinterpret_cast<int32_t*>(to + padded * kDigits);
  int64_t total = 0;
  for (int64_t chunk = 0; chunk < padded / kInt4Chunk; ++chunk) {
    alignas(64) uint8_t plane[kDigits][kInt4Chunk];
    for (int64_t group = 0; group < 4; ++group) {
      int32_t sum = 0;
      for (int64_t i = 32 * group; i < 32 * group + 32; i += 16) {
        const int64_t left = cols - chunk * kInt4Chunk - i;
        const auto some = __mmask16(left >= 16 ? 0xffffu : left > 0 ? (1u << left) - 1 : 0u);
        const __m512 value = _mm512_maskz_loadu_ps(some, x + chunk * kInt4Chunk + i);
        const __m512i n = _mm512_cvtps_epi32(_mm512_mul_ps(value, factor));
        sum += _mm512_reduce_add_epi32(n);
        __m128i parts[kDigits];
        cut_digits(n, parts);
        for (int d = 0; d < kDigits; ++d) _mm_store_si128((__m128i*)(plane[d] + i), parts[d]);
      }
      total += sum;
      sums[4 * chunk + group] = 8 * sum;
    }
    for (int64_t half = 0; half < 2; ++half) {
      for (int d = 0; d < kDigits; ++d, to += kBlock) {
        if (!grouped) {
          memcpy(to, plane[d] + kBlock * half, kBlock);
          continue;
        }
        for (int64_t at = 0; at < kBlock; ++at) to[at] = plane[d][grouped_column(half, at)];
      }
    }
  }
  head.total = double(total);
}

struct Int8Rows : RowPointers {
  int64_t cols;
  const float* scales;
  static constexpr int kTokens = 2;

  Int8Rows(const Matrix& matrix, int64_t first, int64_t end)
      : RowPointers(matrix, first, end), cols(matrix.cols),
        scales(reinterpret_cast<const float*>(matrix.data + matrix.scales_at())) {}

  template <int M>
  MOEJAX_INLINE void run(const void* const* x, float (*out)[M]) const {
    const __m512i sign = _mm512_set1_epi8(int8_t(-128));
    __m512i sum[kTileRows][M][kDigits];
    MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) {
      MOEJAX_UNROLL for (int m = 0; m < M; ++m) {
        MOEJAX_UNROLL for (int d = 0; d < kDigits; ++d) sum[r][m][d] = _mm512_setzero_si512();
      }
    }
    auto step = [&](const __m512i(&w)[kTileRows], int64_t block)
                    __attribute__((always_inline)) {
      MOEJAX_UNROLL for (int m = 0; m < M; ++m) {
        MOEJAX_UNROLL for (int d = 0; d < kDigits; ++d) {
          const __m512i v = _mm512_load_si512(digits(x[m]) + (block * kDigits + d) * kBlock);
          MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) {
            sum[r][m][d] = _mm512_dpbusd_epi32(sum[r][m][d], w[r], v);
          }
        }
      }
    };
    __m512i w[kTileRows];
    int64_t block = 0;
    for (; (block + 1) * kBlock <= cols; ++block) {
      MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) {
        w[r] = _mm512_xor_si512(_mm512_loadu_si512(row[r] + block * kBlock), sign);
        prefetch(r, block * kBlock);
      }
      step(w, block);
    }
    if (const int64_t left = cols - block * kBlock) {
      const auto some = __mmask64((uint64_t{1} << left) - 1);
      MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) {
        w[r] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(some, row[r] + block * kBlock), sign);
      }
      step(w, block);
    }
    MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) {
      MOEJAX_UNROLL for (int m = 0; m < M; ++m) {
        // The weights went in 128 too large.
        double whole = -128.0 * header(x[m]).total;
        MOEJAX_UNROLL for (int d = 0; d < kDigits; ++d) {
          whole += double(_mm512_reduce_add_epi32(sum[r][m][d])) * (1 << (8 * (kDigits - 1 - d)));
        }
        out[r][m] = float(whole * header(x[m]).scale * double(scales[index[r]]));
      }
    }
  }
};

template <int64_t kGroup>
struct Int4Rows : RowPointers {
  int64_t cols, groups;
  const uint16_t* scale[kTileRows];
  static constexpr int kTokens = 4;

  Int4Rows(const Matrix& matrix, int64_t first, int64_t end)
      : RowPointers(matrix, first, end), cols(matrix.cols),
        groups(round_up(cols, kInt4Chunk) / kGroup) {
    auto* scales = reinterpret_cast<const uint16_t*>(matrix.data + matrix.scales_at());
    for (int r = 0; r < kTileRows; ++r) scale[r] = scales + index[r] * groups;
  }

  // Scales of a chunk: four of each row, one after another.
  MOEJAX_INLINE __m512 scales_of(int64_t chunk) const {
    uint64_t four[kTileRows];
    MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) {
      if (kGroup == 32) {
        memcpy(&four[r], scale[r] + 4 * chunk, 8);
      } else {
        uint32_t two;
        memcpy(&two, scale[r] + 2 * chunk, 4);
        four[r] = (two & 0xffffu) * uint64_t{0x10001} | (two >> 16) * uint64_t{0x1000100000000};
      }
    }
    return _mm512_cvtph_ps(_mm256_setr_epi64x(int64_t(four[0]), int64_t(four[1]),
                                              int64_t(four[2]), int64_t(four[3])));
  }

  // Sums over the quarters of four rows: row r in quarter r.
  static MOEJAX_INLINE __m512i quarters(const __m512i (&v)[kTileRows]) {
    const __m512i a = _mm512_add_epi32(_mm512_shuffle_i32x4(v[0], v[1], 0x44),
                                       _mm512_shuffle_i32x4(v[0], v[1], 0xee));
    const __m512i b = _mm512_add_epi32(_mm512_shuffle_i32x4(v[2], v[3], 0x44),
                                       _mm512_shuffle_i32x4(v[2], v[3], 0xee));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  }

  template <int M>
  MOEJAX_INLINE void run(const void* const* x, float (*out)[M]) const {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i regroup = _mm512_broadcast_i32x4(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512 sum[M];
    MOEJAX_UNROLL for (int m = 0; m < M; ++m) sum[m] = _mm512_setzero_ps();
    for (int64_t chunk = 0; chunk < round_up(cols, kInt4Chunk) / kInt4Chunk; ++chunk) {
      __m512i w[2][kTileRows];
      MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) {
        const __m512i both = _mm512_loadu_si512(row[r] + 64 * chunk);
        prefetch(r, 64 * chunk);
        w[0][r] = _mm512_shuffle_epi8(_mm512_and_si512(both, low), regroup);
        w[1][r] = _mm512_shuffle_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), low), regroup);
      }
      const __m512 scales = scales_of(chunk);
      MOEJAX_UNROLL for (int m = 0; m < M; ++m) {
        const uint8_t* from = digits(x[m]) + 2 * chunk * kDigits * kBlock;
        __m512i v[kTileRows];
        MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) v[r] = _mm512_setzero_si512();
        MOEJAX_UNROLL for (int d = 0; d < kDigits; ++d) {
          const __m512i first = _mm512_load_si512(from + d * kBlock);
          const __m512i second = _mm512_load_si512(from + (kDigits + d) * kBlock);
          MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) {
            if (d) v[r] = _mm512_slli_epi32(v[r], 8);
            v[r] = _mm512_dpbusd_epi32(v[r], w[0][r], first);
            v[r] = _mm512_dpbusd_epi32(v[r], w[1][r], second);
          }
        }
        const __m512i offset = _mm512_broadcast_i32x4(
            _mm_loadu_si128((const __m128i*)(offsets(x[m], cols) + 4 * chunk)));
        const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(quarters(v), offset));
        sum[m] = _mm512_fmadd_ps(exact, scales, sum[m]);
      }
    }
    MOEJAX_UNROLL for (int m = 0; m < M; ++m) {
      alignas(64) float part[kTileRows][4];
      _mm512_store_ps(part[0], sum[m]);
      MOEJAX_UNROLL for (int r = 0; r < kTileRows; ++r) {
        const float whole = (part[r][0] + part[r][2]) + (part[r][1] + part[r][3]);
        out[r][m] = float(double(whole) * header(x[m]).scale);
      }
    }
  }
};

template <int M, class Rows>
void fixed_tile(const Rows& rows, const void* const* x, int64_t first, int64_t end,
                float* const* y) {
  float out[kTileRows][M];
  rows.template run<M>(x, out);
  for (int r = 0; r < kTileRows && first + r < end; ++r) {
    for (int m = 0; m < M; ++m) y[m][first + r] = out[r][m];
  }
}

template <class Rows>
void multiply_fixed(const Matrix& matrix, int64_t row0, int64_t row1, const void* const* x,
                    int64_t count, float* const* y) {
  for (int64_t first = row0; first < row1; first += kTileRows) {
    const Rows rows(matrix, first, row1);
    int64_t m = 0;
    for (; m + Rows::kTokens <= count; m += Rows::kTokens) {
      fixed_tile<Rows::kTokens>(rows, x + m, first, row1, y + m);
    }
    for (; m < count; ++m) fixed_tile<1>(rows, x + m, first, row1, y + m);
  }
}

}  // namespace
}  // namespace MOEJAX_ISA
}  // namespace moejax
