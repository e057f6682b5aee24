// The mathematics of the kernels; build.py compiles this file once per instruction set.
#include "attention.h"
#include "kernels.h"
#include "matmul.h"
#include "rows.h"
#include "simd.h"

namespace moejax {
namespace MOEJAX_ISA {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

int64_t packed_bytes(int64_t cols, bool round) {
  return round_up(cols, kInt4Chunk) * (kPairs && round ? 2 : 4);
}

// x[0, count) into columns [at, at + count) of a packed row.
void pack(const float* x, int64_t count, bool round, void* row, int64_t at) {
  if (!round) {
    memcpy(static_cast<float*>(row) + at, x, count * 4);
  } else if (kPairs) {
    auto* out = static_cast<uint16_t*>(row) + at;
    for (int64_t i = 0; i < count; ++i) out[i] = to_bf16(x[i]);
  } else {
    auto* out = static_cast<uint8_t*>(row) + 4 * at;
    for (int64_t i = 0; i < count; ++i) {
      uint32_t word = uint32_t{to_bf16(x[i])} << 16;
      memcpy(out + 4 * i, &word, 4);
    }
  }
}

void pad(void* row, int64_t cols, bool round) {
  const int64_t used = cols * (kPairs && round ? 2 : 4);
  memset(static_cast<uint8_t*>(row) + used, 0, packed_bytes(cols, round) - used);
}

void multiply(const Matrix& matrix, [[maybe_unused]] bool round, int64_t row0, int64_t row1,
              const void* const* x, int64_t count, float* const* y) {
  switch (matrix.format) {
    case kFloat32:
      return multiply_rows<Dense<Float32>>(matrix, row0, row1, x, count, y);
    case kBfloat16:
#if defined(__AVX512BF16__)
      if (round) return multiply_rows<Bfloat16Pairs>(matrix, row0, row1, x, count, y);
#endif
      return multiply_rows<Dense<Bfloat16>>(matrix, row0, row1, x, count, y);
    case kInt8:
      return multiply_rows<Dense<Int8>>(matrix, row0, row1, x, count, y);
    case kInt4g32:
      return multiply_rows<Int4<32>>(matrix, row0, row1, x, count, y);
    case kInt4g64:
      return multiply_rows<Int4<64>>(matrix, row0, row1, x, count, y);
  }
}

#define MOEJAX_TEXT_(x) #x
#define MOEJAX_TEXT(x) MOEJAX_TEXT_(x)

}  // namespace

extern const Kernels kTable;
constexpr Kernels kTable = {
    MOEJAX_TEXT(MOEJAX_ISA), packed_bytes, pack,    pad,     multiply,
    swiglu,                  rms_norm,     softmax, attend,
};

}  // namespace MOEJAX_ISA
}  // namespace moejax
