// Attention of one token: scores, online softmax and sum over its positions, in ascending order.
#pragma once

#include "kernels.h"
#include "rows.h"
#include "simd.h"

namespace moejax {
namespace MOEJAX_ISA {
namespace {

constexpr int64_t kPositions = 128;  // per block; blocks count from the first position attended

// 16 channels of a cached row, zeros past its end.
template <bool kBf16>
MOEJAX_INLINE F16 cached(const uint8_t* row, int64_t j, int64_t count) {
  constexpr int64_t item = kBf16 ? 2 : 4;
  alignas(64) uint8_t tail[16 * item];
  const uint8_t* at = row + j * item;
  if (count - j < 16) {
    memset(tail, 0, sizeof tail);
    memcpy(tail, at, (count - j) * item);
    at = tail;
  }
  if constexpr (kBf16) return from_bf16(reinterpret_cast<const uint16_t*>(at));
  return load(reinterpret_cast<const float*>(at));
}

template <bool kBf16>
struct Head {
  const Attention& a;
  const int64_t query_stride, out_stride;
  alignas(64) float query[kHeads][kMaxHead];
  alignas(64) float out[kHeads][kMaxHead];
  alignas(64) float weights[kHeads][kPositions];
  float best[kHeads];
  F16 mass[kHeads];

  explicit Head(const Attention& attention)
      : a(attention),
        query_stride(round_up(a.key_dim, 16)),
        out_stride(round_up(a.value_dim, 16)) {
    for (int64_t h = 0; h < kHeads; ++h) {
      memset(query[h], 0, query_stride * 4);
      memset(out[h], 0, out_stride * 4);
      memset(weights[h], 0, sizeof weights[h]);
      if (h < a.heads) memcpy(query[h], a.query + h * a.key_dim, a.key_dim * 4);
      best[h] = -__builtin_inff();
      mass[h] = splat(0.0f);
    }
  }

  // Fetches position `i` of the keys ahead of the scores, and its values ahead of the sum.
  MOEJAX_INLINE void prefetch(int64_t i, int64_t ahead) const {
    constexpr int64_t item = kBf16 ? 2 : 4;
    const uint8_t* key = a.keys + (i + ahead) * a.key_stride;
    const uint8_t* value = a.values + i * a.value_stride;
    for (int64_t at = 0; at < a.key_dim * item; at += 64) __builtin_prefetch(key + at, 0, 3);
    for (int64_t at = 0; at < a.value_dim * item; at += 64) __builtin_prefetch(value + at, 0, 2);
  }

  // Scores of `count` positions from `begin` with kTile heads from h0.
  template <int64_t kTile>
  void score(int64_t begin, int64_t count, int64_t h0) {
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* key = a.keys + (begin + i) * a.key_stride;
      if (h0 == 0) prefetch(begin + i, 8);
      F16 acc[kTile];
      for (int64_t h = 0; h < kTile; ++h) acc[h] = splat(0.0f);
      for (int64_t j = 0; j < query_stride; j += 16) {
        const F16 k = cached<kBf16>(key, j, a.key_dim);
        MOEJAX_UNROLL for (int64_t h = 0; h < kTile; ++h) {
          acc[h] = fma(k, load(query[h0 + h] + j), acc[h]);
        }
      }
      for (int64_t h = 0; h < kTile; ++h) weights[h0 + h][i] = sum(acc[h]) * a.scale;
    }
  }

  // Turns scores into weights; returns what earlier weights are worth now.
  float soften(int64_t count, int64_t h) {
    const float lowest = -__builtin_inff();
    const int64_t padded = round_up(count, 16);
    for (int64_t i = count; i < padded; ++i) weights[h][i] = lowest;
    F16 tops = splat(best[h]);
    for (int64_t i = 0; i < padded; i += 16) tops = max(load(weights[h] + i), tops);
    const float top = largest(tops), shift = top == lowest ? 0.0f : top;
    const F16 kept = exp(splat(best[h] - shift));
    mass[h] = mul(mass[h], kept);
    for (int64_t i = 0; i < padded; i += 16) {
      const F16 e = exp(add(load(weights[h] + i), splat(-shift)));
      mass[h] = add(mass[h], e);
      store(weights[h] + i, e);
    }
    best[h] = top;
    float lane[16];
    store(lane, kept);
    return lane[0];
  }

  // Adds the values of `count` positions from `begin` for kTile heads from h0.
  template <int64_t kTile>
  void gather(int64_t begin, int64_t count, int64_t h0, const float* kept) {
    for (int64_t j = 0; j < out_stride; j += 16) {
      F16 acc[kTile];
      for (int64_t h = 0; h < kTile; ++h) {
        acc[h] = mul(load(out[h0 + h] + j), splat(kept[h0 + h]));
      }
      const uint8_t* value = a.values + begin * a.value_stride;
      for (int64_t i = 0; i < count; ++i, value += a.value_stride) {
        const F16 v = cached<kBf16>(value, j, a.value_dim);
        MOEJAX_UNROLL for (int64_t h = 0; h < kTile; ++h) {
          acc[h] = fma(splat(weights[h0 + h][i]), v, acc[h]);
        }
      }
      for (int64_t h = 0; h < kTile; ++h) store(out[h0 + h] + j, acc[h]);
    }
  }

  // step(tile width, first head) over all heads; a tile of 4 may hold one head of padding.
  template <class Step>
  MOEJAX_INLINE void tiles(const Step& step) const {
    for (int64_t h = 0; h < a.heads;) {
      const int64_t left = a.heads - h, width = left > 2 ? 4 : left;
      step(width, h);
      h += width;
    }
  }

  void run() {
    float kept[kHeads] = {};
    for (int64_t begin = a.first; begin <= a.last; begin += kPositions) {
      const int64_t left = a.last - begin + 1, count = left < kPositions ? left : kPositions;
      tiles([&](int64_t width, int64_t h) {
        if (width == 1) score<1>(begin, count, h);
        if (width == 2) score<2>(begin, count, h);
        if (width == 4) score<4>(begin, count, h);
      });
      for (int64_t h = 0; h < a.heads; ++h) kept[h] = soften(count, h);
      tiles([&](int64_t width, int64_t h) {
        if (width == 1) gather<1>(begin, count, h, kept);
        if (width == 2) gather<2>(begin, count, h, kept);
        if (width == 4) gather<4>(begin, count, h, kept);
      });
    }
    for (int64_t h = 0; h < a.heads; ++h) {
      const float total = sum(mass[h]);
      const float scale = total == 0.0f ? 1.0f : 1.0f / total;
      for (int64_t j = 0; j < a.value_dim; ++j) a.out[h * a.value_dim + j] = out[h][j] * scale;
    }
  }
};

void attend(const Attention& attention) {
  if (attention.bf16) {
    Head<true>(attention).run();
  } else {
    Head<false>(attention).run();
  }
}

}  // namespace
}  // namespace MOEJAX_ISA
}  // namespace moejax
