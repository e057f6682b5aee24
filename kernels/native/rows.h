// Row-wise functions: every row is computed alone and in a fixed order.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace moejax {
namespace MOEJAX_ISA {
namespace {

// Calls use(f32 x 16, first column, lanes) over a row; lanes past the end hold `fill`.
template <class Use>
MOEJAX_INLINE void each16(const float* x, int64_t count, float fill, const Use& use) {
  int64_t j = 0;
  for (; j + 16 <= count; j += 16) use(load(x + j), j, 16);
  if (j == count) return;
  float tail[16];
  for (int i = 0; i < 16; ++i) tail[i] = fill;
  memcpy(tail, x + j, (count - j) * 4);
  use(load(tail), j, int(count - j));
}

MOEJAX_INLINE void store_some(float* at, const F16& x, int lanes) {
  if (lanes == 16) return store(at, x);
  float tail[16];
  store(tail, x);
  memcpy(at, tail, lanes * 4);
}

MOEJAX_INLINE F16 max(const F16& a, const F16& b) {
  F16 r;
  for (int i = 0; i < kParts; ++i) r.p[i] = select(a.p[i] > b.p[i], a.p[i], b.p[i]);
  return r;
}

// Largest of the lanes; NaN lanes do not count.
MOEJAX_INLINE float largest(const F16& x) {
  float lane[16];
  store(lane, x);
  float top = lane[0];
  for (int i = 1; i < 16; ++i) top = lane[i] > top ? lane[i] : top;
  return top;
}

// silu(gate) * up
void swiglu(const float* gate, const float* up, int64_t count, float* h) {
  each16(gate, count, 0.0f, [&](const F16& g, int64_t j, int lanes) {
    float other[16] = {};
    memcpy(other, up + j, lanes * 4);
    F16 e = exp(mul(g, splat(-1.0f))), u = load(other), r;
    for (int i = 0; i < kParts; ++i) r.p[i] = g.p[i] / (1.0f + e.p[i]) * u.p[i];
    store_some(h + j, r, lanes);
  });
}

void rms_norm(const float* x, int64_t rows, int64_t cols, const void* weight, bool bf16, float eps,
              float* y) {
  for (int64_t n = 0; n < rows; ++n, x += cols, y += cols) {
    F16 squares = splat(0.0f);
    each16(x, cols, 0.0f, [&](const F16& v, int64_t, int) { squares = fma(v, v, squares); });
    const F16 scale = splat(1.0f / __builtin_sqrtf(sum(squares) / float(cols) + eps));
    each16(x, cols, 0.0f, [&](const F16& v, int64_t j, int lanes) {
      float wide[16] = {};
      uint16_t narrow[16] = {};
      F16 w;
      if (bf16) {
        memcpy(narrow, static_cast<const uint16_t*>(weight) + j, lanes * 2);
        w = from_bf16(narrow);
      } else {
        memcpy(wide, static_cast<const float*>(weight) + j, lanes * 4);
        w = load(wide);
      }
      store_some(y + j, mul(mul(v, scale), w), lanes);
    });
  }
}

void softmax(const float* x, int64_t rows, int64_t cols, float* y) {
  const float lowest = -__builtin_inff();
  for (int64_t n = 0; n < rows; ++n, x += cols, y += cols) {
    F16 tops = splat(lowest), total = splat(0.0f);
    each16(x, cols, lowest, [&](const F16& v, int64_t, int) { tops = max(v, tops); });
    const float top = largest(tops);
    const F16 shift = splat(top == lowest ? 0.0f : -top);
    each16(x, cols, lowest, [&](const F16& v, int64_t j, int lanes) {
      const F16 e = exp(add(v, shift));
      total = add(total, e);
      store_some(y + j, e, lanes);
    });
    const float mass = sum(total);
    const F16 scale = splat(1.0f / mass);
    each16(y, cols, 0.0f, [&](const F16& v, int64_t j, int lanes) {
      store_some(y + j, mul(v, scale), lanes);
    });
  }
}

}  // namespace
}  // namespace MOEJAX_ISA
}  // namespace moejax
