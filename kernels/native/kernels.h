// What the mathematics (math.cc, compiled once per instruction set) offers to the handlers.
#pragma once

#include <cstdint>

namespace moejax {

enum Format : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4g32 = 3, kInt4g64 = 4 };

constexpr int64_t kPartAlignment = 64;
constexpr int64_t kInt4Chunk = 128;  // columns of 64 bytes of int4
constexpr int64_t kBlockRows = 32;   // activation rows of one call of multiply, at most

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

constexpr int64_t group_of(Format format) { return format == kInt4g64 ? 64 : 32; }

// Bytes of one row of weights, scales not counted.
constexpr int64_t row_bytes(Format format, int64_t cols) {
  switch (format) {
    case kFloat32:
      return 4 * cols;
    case kBfloat16:
      return 2 * cols;
    case kInt8:
      return cols;
    default:
      return round_up(cols, kInt4Chunk) / 2;
  }
}

struct Matrix {
  const uint8_t* data;
  int64_t rows, cols;
  Format format;

  constexpr int64_t scales_at() const {
    return round_up(rows * row_bytes(format, cols), kPartAlignment);
  }
  constexpr int64_t bytes() const {
    switch (format) {
      case kFloat32:
      case kBfloat16:
        return rows * row_bytes(format, cols);
      case kInt8:
        return scales_at() + 4 * rows;
      default:
        return scales_at() + 2 * rows * (round_up(cols, kInt4Chunk) / group_of(format));
    }
  }
};

// One token's attention with up to kHeads query heads of one key-value head.
constexpr int64_t kHeads = 8;
constexpr int64_t kMaxHead = 1024;  // channels of a head

struct Attention {
  const float* query;                // [heads, key_dim]
  const uint8_t* keys;               // position 0 of the key-value head
  const uint8_t* values;
  int64_t key_stride, value_stride;  // bytes from one position to the next
  int64_t key_dim, value_dim, heads;
  int64_t first, last;               // positions, both included
  bool bf16;                         // keys and values, else f32
  float scale;
  float* out;                        // [heads, value_dim]
};

// How activations are packed, once per call: f32, rounded to bf16 in the type that the instruction
// set multiplies, or in fixed point for int8 and for int4 (fixed.h).
enum Packing : int32_t { kFloats, kRounded, kFixed, kFixedGroups };

struct Kernels {
  const char* name;
  // For matrices like this one; `round` asks for bf16.
  Packing (*packing)(Format format, int64_t cols, bool round);
  int64_t (*packed_bytes)(int64_t cols, Packing packing);
  void (*pack)(const float* x, int64_t cols, Packing packing, void* row);
  // y[m][row] for rows [row0, row1) and count <= kBlockRows packed rows x[m].
  void (*multiply)(const Matrix& matrix, Packing packing, int64_t row0, int64_t row1,
                   const void* const* x, int64_t count, float* const* y);
  void (*swiglu)(const float* gate, const float* up, int64_t count, float* h);
  void (*rms_norm)(const float* x, int64_t rows, int64_t cols, const void* weight, bool bf16,
                   float eps, float* y);
  void (*softmax)(const float* x, int64_t rows, int64_t cols, float* y);
  void (*attend)(const Attention& attention);
};

const Kernels& kernels();  // of the instruction set in use (dispatch.cc)

}  // namespace moejax
