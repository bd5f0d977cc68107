// Vectors of fp32 lanes, one small function per idea, for the instruction set that this file is compiled for.
// No standard headers with templates here: an inline function compiled with AVX-512 must never be the copy
// that the linker keeps for code that runs on every CPU.
#pragma once

#include <immintrin.h>

#include "../problem.h"

#define LORA_FUSED_INLINE __attribute__((always_inline)) static inline

namespace lora_fused::LORA_FUSED_ISA {

struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

LORA_FUSED_INLINE i64 min(i64 a, i64 b) { return a < b ? a : b; }
LORA_FUSED_INLINE i64 max(i64 a, i64 b) { return a > b ? a : b; }
LORA_FUSED_INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
LORA_FUSED_INLINE i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }

LORA_FUSED_INLINE void copy_bytes(void* to, const void* from, i64 bytes) {
  __builtin_memcpy(to, from, bytes);
}
LORA_FUSED_INLINE void zero_bytes(void* to, i64 bytes) { __builtin_memset(to, 0, bytes); }

#if defined(__AVX512F__)

using Vec = __m512;
using Words = __m512i;
constexpr int kLanes = 16;

LORA_FUSED_INLINE Vec vec_zero() { return _mm512_setzero_ps(); }
LORA_FUSED_INLINE Vec vec_set1(float v) { return _mm512_set1_ps(v); }
LORA_FUSED_INLINE Vec vec_load(const float* p) { return _mm512_loadu_ps(p); }
LORA_FUSED_INLINE void vec_store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
LORA_FUSED_INLINE Vec vec_add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
LORA_FUSED_INLINE Vec vec_mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
LORA_FUSED_INLINE Vec vec_fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Lane i is v[i] where bit i of keep is set, else 0.
LORA_FUSED_INLINE Vec vec_keep(Vec v, u32 keep) {
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(keep), v);
}

LORA_FUSED_INLINE Words words_zero() { return _mm512_setzero_si512(); }
LORA_FUSED_INLINE Words words_load(const void* p) { return _mm512_loadu_si512(p); }
LORA_FUSED_INLINE void words_store(void* p, Words v) { _mm512_storeu_si512(p, v); }
LORA_FUSED_INLINE Words words_set1(u32 v) { return _mm512_set1_epi32(static_cast<int>(v)); }
LORA_FUSED_INLINE Words vec_as_words(Vec v) { return _mm512_castps_si512(v); }
LORA_FUSED_INLINE Vec words_as_vec(Words v) { return _mm512_castsi512_ps(v); }

LORA_FUSED_INLINE Vec vec_load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
LORA_FUSED_INLINE Vec vec_load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LORA_FUSED_INLINE void vec_store(Float16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LORA_FUSED_INLINE void vec_store(BFloat16* p, Vec v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
#else
  // Round to nearest even on the bits; NaN stays a (quiet) NaN.
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  const __m512i result = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
#endif
}

// Element i (of kBytes bytes) is v[i] where bit i of keep is set, else 0.
template <int kBytes>
LORA_FUSED_INLINE Words words_keep(Words v, u32 keep) {
  if constexpr (kBytes == 4) {
    return _mm512_maskz_mov_epi32(static_cast<__mmask16>(keep), v);
  } else {
    return _mm512_maskz_mov_epi16(keep, v);
  }
}

// rows[i] holds words 0..15 of row i; afterwards rows[j] holds word j of rows 0..15.
LORA_FUSED_INLINE void transpose(Words rows[16]) {
  Words t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Words a = _mm512_shuffle_i32x4(u[i], u[4 + i], 0x88),
                b = _mm512_shuffle_i32x4(u[i], u[4 + i], 0xdd);
    const Words c = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0x88);
    const Words d = _mm512_shuffle_i32x4(u[8 + i], u[12 + i], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    rows[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
    rows[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
    rows[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

#else  // AVX2

using Vec = __m256;
using Words = __m256i;
constexpr int kLanes = 8;

LORA_FUSED_INLINE Vec vec_zero() { return _mm256_setzero_ps(); }
LORA_FUSED_INLINE Vec vec_set1(float v) { return _mm256_set1_ps(v); }
LORA_FUSED_INLINE Vec vec_load(const float* p) { return _mm256_loadu_ps(p); }
LORA_FUSED_INLINE void vec_store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
LORA_FUSED_INLINE Vec vec_add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
LORA_FUSED_INLINE Vec vec_mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
LORA_FUSED_INLINE Vec vec_fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
LORA_FUSED_INLINE Vec vec_keep(Vec v, u32 keep) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(keep)), bit);
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)));
}

LORA_FUSED_INLINE Words words_zero() { return _mm256_setzero_si256(); }
LORA_FUSED_INLINE Words words_load(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
LORA_FUSED_INLINE void words_store(void* p, Words v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
LORA_FUSED_INLINE Words words_set1(u32 v) { return _mm256_set1_epi32(static_cast<int>(v)); }
LORA_FUSED_INLINE Words vec_as_words(Vec v) { return _mm256_castps_si256(v); }
LORA_FUSED_INLINE Vec words_as_vec(Words v) { return _mm256_castsi256_ps(v); }

LORA_FUSED_INLINE Vec vec_load(const BFloat16* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
LORA_FUSED_INLINE Vec vec_load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
LORA_FUSED_INLINE void vec_store(Float16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LORA_FUSED_INLINE void vec_store(BFloat16* p, Vec v) {
  // Round to nearest even on the bits; NaN stays a (quiet) NaN.
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i result = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

// Element i (of kBytes bytes) is v[i] where bit i of keep is set, else 0.
template <int kBytes>
LORA_FUSED_INLINE Words words_keep(Words v, u32 keep) {
  if constexpr (kBytes == 4) {
    return vec_as_words(vec_keep(words_as_vec(v), keep));
  } else {
    const Words bit =
        _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    const Words set = _mm256_and_si256(_mm256_set1_epi16(static_cast<short>(keep)), bit);
    return _mm256_and_si256(v, _mm256_cmpeq_epi16(set, bit));
  }
}

// rows[i] holds words 0..7 of row i; afterwards rows[j] holds word j of rows 0..7.
LORA_FUSED_INLINE void transpose(Words rows[8]) {
  Words t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2x128_si256(u[i], u[4 + i], 0x20);
    rows[4 + i] = _mm256_permute2x128_si256(u[i], u[4 + i], 0x31);
  }
}

#endif

// The first n elements (0 <= n), zeros behind; never touches memory past them.
#if defined(__AVX512F__)
LORA_FUSED_INLINE u32 first_bits(i64 n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }
LORA_FUSED_INLINE Vec vec_load_part(const float* p, i64 n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_bits(n)), p);
}
LORA_FUSED_INLINE Vec vec_load_part(const Float16* p, i64 n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_bits(n)), p));
}
LORA_FUSED_INLINE Vec vec_load_part(const BFloat16* p, i64 n) {
  const __m256i half = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_bits(n)), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
LORA_FUSED_INLINE Words words_load_part(const BFloat16* p, i64 n) {
  return _mm512_maskz_loadu_epi16(first_bits(n), p);
}
#else
template <class T>
LORA_FUSED_INLINE Vec vec_load_part(const T* p, i64 n) {
  if (n >= kLanes) return vec_load(p);
  T buffer[kLanes] = {};
  copy_bytes(buffer, p, n * static_cast<i64>(sizeof(T)));
  return vec_load(buffer);
}
#endif

template <class T>
LORA_FUSED_INLINE void vec_store_part(T* p, Vec v, i64 n) {
  if (n >= kLanes) return vec_store(p, v);
  T buffer[kLanes];
  vec_store(buffer, v);
  copy_bytes(p, buffer, n * static_cast<i64>(sizeof(T)));
}

// c + a * b on words that are fp32 values, or on pairs of bf16 (both products of a pair are added).
template <bool kPairs>
LORA_FUSED_INLINE Vec multiply_add(Words a, Words b, Vec c) {
  if constexpr (kPairs) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#else
    static_assert(!kPairs, "bf16 pairs need AVX512-BF16; other instruction sets convert to fp32 words");
#endif
  } else {
    return vec_fma(words_as_vec(a), words_as_vec(b), c);
  }
}

LORA_FUSED_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// Into the second-level cache only.
LORA_FUSED_INLINE void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

#if defined(__AVX512F__)
// Word i is (a[i], b[i]) with a in the low half: two rows of n elements become n pairs.
LORA_FUSED_INLINE Words interleave_pairs(const BFloat16* a, const BFloat16* b, i64 n) {
  const __mmask16 some = static_cast<__mmask16>(first_bits(n));
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, a));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, b));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#endif

LORA_FUSED_INLINE float to_float(float v) { return v; }
LORA_FUSED_INLINE float to_float(Float16 v) { return _cvtsh_ss(v.bits); }
LORA_FUSED_INLINE float to_float(BFloat16 v) {
  const u32 bits = static_cast<u32>(v.bits) << 16;
  float value;
  copy_bytes(&value, &bits, 4);
  return value;
}

}  // namespace lora_fused::LORA_FUSED_ISA
