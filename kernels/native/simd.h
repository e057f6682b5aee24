// 16 logical lanes on every instruction set. No standard library templates here or in the other
// headers of math.cc: the linker keeps one copy of each, and it might be the AVX-512 one.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define MOEJAX_INLINE inline __attribute__((always_inline))
#define MOEJAX_UNROLL _Pragma("GCC unroll 16")

namespace moejax {
namespace MOEJAX_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = 16 / kWidth;

typedef float Vf __attribute__((vector_size(4 * kWidth)));
typedef int32_t Vi __attribute__((vector_size(4 * kWidth)));
typedef float VfMemory __attribute__((vector_size(4 * kWidth), aligned(1), may_alias));
typedef int32_t ViMemory __attribute__((vector_size(4 * kWidth), aligned(1), may_alias));

struct F16 {
  Vf p[kParts];
};
struct I16 {
  Vi p[kParts];
};

MOEJAX_INLINE F16 splat(float x) {
  F16 r;
  for (int i = 0; i < kParts; ++i) r.p[i] = x - Vf{};
  return r;
}

MOEJAX_INLINE F16 load(const float* at) {
  F16 r;
  for (int i = 0; i < kParts; ++i) r.p[i] = *reinterpret_cast<const VfMemory*>(at + i * kWidth);
  return r;
}

MOEJAX_INLINE I16 load_words(const void* at) {
  I16 r;
  for (int i = 0; i < kParts; ++i) r.p[i] = static_cast<const ViMemory*>(at)[i];
  return r;
}

MOEJAX_INLINE void store(float* at, const F16& x) {
  for (int i = 0; i < kParts; ++i) *reinterpret_cast<VfMemory*>(at + i * kWidth) = x.p[i];
}

MOEJAX_INLINE Vf fma(Vf a, Vf b, Vf c) {
#if defined(__AVX512F__)
  return (Vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

MOEJAX_INLINE F16 fma(const F16& a, const F16& b, const F16& c) {
  F16 r;
  for (int i = 0; i < kParts; ++i) r.p[i] = fma(a.p[i], b.p[i], c.p[i]);
  return r;
}

MOEJAX_INLINE F16 mul(const F16& a, const F16& b) {
  F16 r;
  for (int i = 0; i < kParts; ++i) r.p[i] = a.p[i] * b.p[i];
  return r;
}

MOEJAX_INLINE F16 add(const F16& a, const F16& b) {
  F16 r;
  for (int i = 0; i < kParts; ++i) r.p[i] = a.p[i] + b.p[i];
  return r;
}

// Sum of the lanes: always i + (i + 8), then + 4, + 2, + 1.
MOEJAX_INLINE float sum(const F16& x) {
  float lane[16];
  store(lane, x);
#if defined(__AVX512F__)
  __m256 a = _mm256_add_ps(_mm512_castps512_ps256((__m512)x.p[0]),
                           _mm512_extractf32x8_ps((__m512)x.p[0], 1));
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
#else
  for (int n = 8; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  }
  return lane[0];
#endif
}

MOEJAX_INLINE F16 from_bf16(const uint16_t* at) {
  F16 r;
#if defined(__AVX512F__)
  __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  r.p[0] = (Vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at) + i);
    r.p[i] = (Vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16);
  }
#elif defined(__x86_64__)
  for (int i = 0; i < 2; ++i) {
    __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at) + i);
    r.p[2 * i] = (Vf)_mm_unpacklo_epi16(_mm_setzero_si128(), x);
    r.p[2 * i + 1] = (Vf)_mm_unpackhi_epi16(_mm_setzero_si128(), x);
  }
#else
  for (int i = 0; i < 4; ++i) r.p[i] = (Vf)vshll_n_u16(vld1_u16(at + 4 * i), 16);
#endif
  return r;
}

MOEJAX_INLINE F16 from_int8(const int8_t* at) {
  F16 r;
#if defined(__AVX512F__)
  __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  r.p[0] = (Vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + 8 * i));
    r.p[i] = (Vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x));
  }
#elif defined(__x86_64__)
  __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  __m128i half[2] = {_mm_unpacklo_epi8(x, x), _mm_unpackhi_epi8(x, x)};
  for (int i = 0; i < 2; ++i) {
    __m128i low = _mm_srai_epi32(_mm_unpacklo_epi16(half[i], half[i]), 24);
    __m128i high = _mm_srai_epi32(_mm_unpackhi_epi16(half[i], half[i]), 24);
    r.p[2 * i] = (Vf)_mm_cvtepi32_ps(low);
    r.p[2 * i + 1] = (Vf)_mm_cvtepi32_ps(high);
  }
#else
  int8x16_t x = vld1q_s8(at);
  int16x8_t half[2] = {vmovl_s8(vget_low_s8(x)), vmovl_s8(vget_high_s8(x))};
  for (int i = 0; i < 2; ++i) {
    r.p[2 * i] = (Vf)vcvtq_f32_s32(vmovl_s16(vget_low_s16(half[i])));
    r.p[2 * i + 1] = (Vf)vcvtq_f32_s32(vmovl_s16(vget_high_s16(half[i])));
  }
#endif
  return r;
}

// The 16 values that int4 can take, times a scale; `nibble` then picks one per lane.
MOEJAX_INLINE F16 int4_table(float scale) {
#if defined(__AVX512F__)
  const Vf steps = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  F16 r;
  r.p[0] = steps * scale;
  return r;
#else
  return splat(scale);
#endif
}

// Weights of nibble k of 16 words.
MOEJAX_INLINE F16 nibble(const I16& words, int k, const F16& table) {
  F16 r;
#if defined(__AVX512F__)
  __m512i shifted = _mm512_srli_epi32((__m512i)words.p[0], 4 * k);
  r.p[0] = (Vf)_mm512_permutexvar_ps(shifted, (__m512)table.p[0]);  // reads the low 4 bits only
#else
  for (int i = 0; i < kParts; ++i) {
    r.p[i] = __builtin_convertvector(((words.p[i] >> (4 * k)) & 15) - 8, Vf) * table.p[i];
  }
#endif
  return r;
}

MOEJAX_INLINE float from_half(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#elif defined(__aarch64__)
  __fp16 x;
  memcpy(&x, &bits, 2);
  return x;
#else
  uint32_t sign = uint32_t{bits & 0x8000u} << 16, rest = bits & 0x7fffu, word;
  float magnitude;
  if (rest >= 0x7c00u) {
    word = 0x7f800000u | (rest & 0x3ffu) << 13;
  } else if (rest >= 0x400u) {
    word = (rest << 13) + 0x38000000u;
  } else {
    magnitude = float(rest) * 0x1p-24f;
    memcpy(&word, &magnitude, 4);
  }
  word |= sign;
  memcpy(&magnitude, &word, 4);
  return magnitude;
#endif
}

// Nearest bf16, ties to even; a NaN stays one.
MOEJAX_INLINE uint16_t to_bf16(float x) {
  uint32_t word;
  memcpy(&word, &x, 4);
  uint32_t rounded = (word + 0x7fffu + (word >> 16 & 1)) >> 16;
  return uint16_t((word & 0x7fffffffu) > 0x7f800000u ? word >> 16 | 0x40u : rounded);
}

MOEJAX_INLINE Vf select(Vi mask, Vf a, Vf b) { return (Vf)((mask & (Vi)a) | (~mask & (Vi)b)); }

// e^x to 2e-7 relative; 0 below -87.3, infinity above 88.7.
MOEJAX_INLINE F16 exp(const F16& x) {
  const float magic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer, kept in the low bits
  F16 r;
  for (int i = 0; i < kParts; ++i) {
    Vf v = x.p[i];
    v = select(v < 89.0f, v, 89.0f - Vf{});
    v = select(v > -88.0f, v, -88.0f - Vf{});
    Vf shifted = fma(v, 1.44269504f - Vf{}, magic - Vf{});
    Vf n = shifted - magic;
    Vf f = fma(n, -0.693359375f - Vf{}, v);
    f = fma(n, 2.12194440e-4f - Vf{}, f);
    Vf y = fma(1.9875691500e-4f - Vf{}, f, 1.3981999507e-3f - Vf{});
    y = fma(y, f, 8.3334519073e-3f - Vf{});
    y = fma(y, f, 4.1665795894e-2f - Vf{});
    y = fma(y, f, 1.6666665459e-1f - Vf{});
    y = fma(y, f, 5.0000001201e-1f - Vf{});
    y = fma(y, f * f, f) + 1.0f;
    // 2^n in two factors: 2^128 is not a float.
    Vi k = (Vi)shifted - (Vi)(magic - Vf{});
    Vi half = k >> 1;
    y = y * (Vf)((half + 127) << 23) * (Vf)((k - half + 127) << 23);
    y = select(x.p[i] < -87.3f, Vf{}, y);
    y = select(x.p[i] > 88.7228f, __builtin_inff() - Vf{}, y);
    r.p[i] = select(x.p[i] == x.p[i], y, x.p[i]);
  }
  return r;
}

}  // namespace
}  // namespace MOEJAX_ISA
}  // namespace moejax
