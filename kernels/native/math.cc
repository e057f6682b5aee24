// The mathematics of the kernels; build.py compiles this file once per instruction set.
#include "attention.h"
#include "kernels.h"
#include "matmul.h"
#include "rows.h"
#include "simd.h"
#if defined(__AMX_INT8__)
#include "tiles_int4.h"
#elif defined(__AVX512VNNI__)
#include "fixed.h"
#endif

namespace moejax {
namespace MOEJAX_ISA {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

Packing packing(Format format, [[maybe_unused]] int64_t cols, bool round) {
#if defined(__AVX512VNNI__)
  if (format == kInt8 && cols <= kFixedCols) return kFixed;
  if (format == kInt4g32 || format == kInt4g64) return kFixedGroups;
#endif
  return round && format == kBfloat16 ? kRounded : kFloats;
}

#if defined(__AVX512VNNI__)
constexpr bool is_fixed(Packing packing) { return packing == kFixed || packing == kFixedGroups; }
#endif

// Packed rows are zero beyond their columns, up to a whole chunk.
int64_t packed_bytes(int64_t cols, Packing packing) {
#if defined(__AVX512VNNI__)
  if (is_fixed(packing)) return fixed_bytes(cols);
#endif
  return round_up(cols, kInt4Chunk) * (kPairs && packing == kRounded ? 2 : 4);
}

void pack(const float* x, int64_t cols, Packing packing, void* row) {
#if defined(__AVX512VNNI__)
  if (is_fixed(packing)) return pack_fixed(x, cols, packing == kFixedGroups, row);
#endif
  const int64_t padded = round_up(cols, kInt4Chunk);
  if (packing == kFloats) {
    memcpy(row, x, 4 * cols);
  } else if (kPairs) {
    auto* out = static_cast<uint16_t*>(row);
    for (int64_t i = 0; i < cols; ++i) out[i] = to_bf16(x[i]);
    memset(out + cols, 0, 2 * (padded - cols));
    return;
  } else {
    for (int64_t i = 0; i < cols; ++i) {
      uint32_t word = uint32_t{to_bf16(x[i])} << 16;
      memcpy(static_cast<uint8_t*>(row) + 4 * i, &word, 4);
    }
  }
  memset(static_cast<uint8_t*>(row) + 4 * cols, 0, 4 * (padded - cols));
}

// Weights that meet the activations as floats.
void multiply_floats(const Matrix& matrix, int64_t row0, int64_t row1, const void* const* x,
                     int64_t count, float* const* y) {
  switch (matrix.format) {
    case kFloat32:
      return multiply_rows<Dense<Float32>>(matrix, row0, row1, x, count, y);
    case kBfloat16:
      return multiply_rows<Dense<Bfloat16>>(matrix, row0, row1, x, count, y);
    case kInt8:
      return multiply_rows<Dense<Int8>>(matrix, row0, row1, x, count, y);
    case kInt4g32:
      return multiply_rows<Int4<32>>(matrix, row0, row1, x, count, y);
    case kInt4g64:
      return multiply_rows<Int4<64>>(matrix, row0, row1, x, count, y);
  }
}

#if defined(__AVX512VNNI__)
#if defined(__AMX_INT8__)
// Rows of activations that vectors multiply faster than tiles do.
constexpr int64_t kFewInt8 = 1, kFewInt4 = 8;
#endif

void multiply_finite(const Matrix& matrix, int64_t row0, int64_t row1, const void* const* x,
                     int64_t count, float* const* y) {
#if defined(__AMX_INT8__)
  if (count > (matrix.format == kInt8 ? kFewInt8 : kFewInt4)) {
    return (matrix.format == kInt8 ? tiles_int8 : tiles_int4)(matrix, row0, row1, x, count, y);
  }
#endif
  switch (matrix.format) {
    case kInt8:
      return multiply_fixed<Int8Rows>(matrix, row0, row1, x, count, y);
    case kInt4g32:
      return multiply_fixed<Int4Rows<32>>(matrix, row0, row1, x, count, y);
    default:
      return multiply_fixed<Int4Rows<64>>(matrix, row0, row1, x, count, y);
  }
}

// Runs of rows in fixed point, and each of the others by itself.
void multiply_runs(const Matrix& matrix, int64_t row0, int64_t row1, const void* const* x,
                   int64_t count, float* const* y) {
  for (int64_t m = 0; m < count;) {
    int64_t run = 0;
    while (m + run < count && header(x[m + run]).finite) ++run;
    if (run) multiply_finite(matrix, row0, row1, x + m, run, y + m);
    m += run;
    if (m == count) return;
    const void* floats = digits(x[m]);
    multiply_floats(matrix, row0, row1, &floats, 1, y + m);
    ++m;
  }
}
#endif

void multiply(const Matrix& matrix, [[maybe_unused]] Packing packing, int64_t row0,
              int64_t row1, const void* const* x, int64_t count, float* const* y) {
#if defined(__AMX_BF16__)
  if (packing == kRounded) return tiles_bfloat16(matrix, row0, row1, x, count, y);
#elif defined(__AVX512BF16__)
  if (packing == kRounded) {
    return multiply_rows<Bfloat16Pairs>(matrix, row0, row1, x, count, y);
  }
#endif
#if defined(__AVX512VNNI__)
  if (is_fixed(packing)) return multiply_runs(matrix, row0, row1, x, count, y);
#endif
  multiply_floats(matrix, row0, row1, x, count, y);
}

#define MOEJAX_TEXT_(x) #x
#define MOEJAX_TEXT(x) MOEJAX_TEXT_(x)

}  // namespace

extern const Kernels kTable;
constexpr Kernels kTable = {
    MOEJAX_TEXT(MOEJAX_ISA), packing,  packed_bytes, pack,   multiply,
    swiglu,                  rms_norm, softmax,      attend,
};

}  // namespace MOEJAX_ISA
}  // namespace moejax
