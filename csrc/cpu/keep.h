// The dropout mask as bits, kLanes counters at a time. The generator is defined in ../dropout.h; this is the
// same arithmetic on vectors, and the tests compare the two bit for bit.
#pragma once

#include "../dropout.h"
#include "vector.h"

namespace lora_fused::LORA_FUSED_ISA {

// Columns that one vector step covers.
constexpr i64 kKeepColumns = kLanes * philox::kElementsPerCounter;

#if defined(__AVX512F__)
// NOTE: the lane order is such that the 4x4 transposition inside 128-bit lanes leaves the counters in
// sequence.
LORA_FUSED_INLINE Words counter_lanes() {
  return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}
LORA_FUSED_INLINE Words words_add(Words a, Words b) { return _mm512_add_epi32(a, b); }
LORA_FUSED_INLINE Words words_xor(Words a, Words b, Words c) {
  return _mm512_ternarylogic_epi32(a, b, c, 0x96);
}
// 1 in the lanes where sum = a + b wrapped around.
LORA_FUSED_INLINE Words words_carry(Words sum, Words a) {
  return _mm512_maskz_set1_epi32(_mm512_cmplt_epu32_mask(sum, a), 1);
}
LORA_FUSED_INLINE void multiply_wide(Words a, u32 multiplier, Words& high, Words& low) {
  const Words m = words_set1(multiplier);
  const Words even = _mm512_mul_epu32(a, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
  high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
LORA_FUSED_INLINE void store_keep(const Words c[4], u32 threshold, u32* bits) {
  const Words t0 = _mm512_unpacklo_epi32(c[0], c[1]), t1 = _mm512_unpackhi_epi32(c[0], c[1]);
  const Words t2 = _mm512_unpacklo_epi32(c[2], c[3]), t3 = _mm512_unpackhi_epi32(c[2], c[3]);
  const Words limit = _mm512_set1_epi16(static_cast<short>(threshold));
  bits[0] = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(t0, t2), limit);
  bits[1] = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(t0, t2), limit);
  bits[2] = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(t1, t3), limit);
  bits[3] = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(t1, t3), limit);
}
#else
LORA_FUSED_INLINE Words counter_lanes() { return _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7); }
LORA_FUSED_INLINE Words words_add(Words a, Words b) { return _mm256_add_epi32(a, b); }
LORA_FUSED_INLINE Words words_xor(Words a, Words b, Words c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
LORA_FUSED_INLINE Words words_carry(Words sum, Words a) {
  const Words not_below = _mm256_cmpeq_epi32(_mm256_max_epu32(sum, a), sum);
  return _mm256_andnot_si256(not_below, words_set1(1));
}
LORA_FUSED_INLINE void multiply_wide(Words a, u32 multiplier, Words& high, Words& low) {
  const Words m = words_set1(multiplier);
  const Words even = _mm256_mul_epu32(a, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), m);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
LORA_FUSED_INLINE u32 compare_pair(Words a, Words b, Words limit) {
  const Words keep_a = _mm256_cmpeq_epi16(_mm256_max_epu16(a, limit), a);
  const Words keep_b = _mm256_cmpeq_epi16(_mm256_max_epu16(b, limit), b);
  const Words bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(keep_a, keep_b), 0xD8);
  return static_cast<u32>(_mm256_movemask_epi8(bytes));
}
LORA_FUSED_INLINE void store_keep(const Words c[4], u32 threshold, u32* bits) {
  const Words t0 = _mm256_unpacklo_epi32(c[0], c[1]), t1 = _mm256_unpackhi_epi32(c[0], c[1]);
  const Words t2 = _mm256_unpacklo_epi32(c[2], c[3]), t3 = _mm256_unpackhi_epi32(c[2], c[3]);
  const Words limit = _mm256_set1_epi16(static_cast<short>(threshold));
  bits[0] = compare_pair(_mm256_unpacklo_epi64(t0, t2), _mm256_unpackhi_epi64(t0, t2), limit);
  bits[1] = compare_pair(_mm256_unpacklo_epi64(t1, t3), _mm256_unpackhi_epi64(t1, t3), limit);
}
#endif

LORA_FUSED_INLINE void generate_keep(u64 seed, u64 index, u32 threshold, u32* bits) {
  const Words base = words_set1(static_cast<u32>(index));
  Words c[4] = {words_add(counter_lanes(), base), words_zero(), words_zero(), words_zero()};
  c[1] = words_add(words_set1(static_cast<u32>(index >> 32)), words_carry(c[0], base));
  u32 key0 = static_cast<u32>(seed), key1 = static_cast<u32>(seed >> 32);
#pragma GCC unroll 7
  for (int round = 0; round < philox::kRounds; ++round) {
    Words high0, low0, high1, low1;
    multiply_wide(c[0], philox::kMultiplier0, high0, low0);
    multiply_wide(c[2], philox::kMultiplier1, high1, low1);
    c[0] = words_xor(high1, c[1], words_set1(key0));
    c[1] = low1;
    c[2] = words_xor(high0, c[3], words_set1(key1));
    c[3] = low0;
    key0 += philox::kWeyl0;
    key1 += philox::kWeyl1;
  }
  store_keep(c, threshold, bits);
}

// Words of `bits` that keep_row writes for `cols` columns.
LORA_FUSED_INLINE i64 keep_words(i64 cols) { return round_up(cols, kKeepColumns) / 32; }

// Bit c of `bits` is set iff (row, col0 + c) is kept, c < cols; bits behind the row's end are undefined.
// col0 is a multiple of 8; writes keep_words(cols) words.
LORA_FUSED_INLINE void keep_row(const Dropout& dropout, i64 row, i64 col0, i64 cols, u32* bits) {
  if (dropout.threshold > 0xffff) {
    zero_bytes(bits, keep_words(cols) * static_cast<i64>(sizeof(u32)));
    return;
  }
  const u64 first = static_cast<u64>(row) * philox::counters_per_row(dropout.row_length) +
                    static_cast<u64>(col0 / philox::kElementsPerCounter);
  for (i64 c = 0; c < cols; c += kKeepColumns)
    generate_keep(dropout.seed, first + static_cast<u64>(c / philox::kElementsPerCounter), dropout.threshold,
                  bits + c / 32);
}

}  // namespace lora_fused::LORA_FUSED_ISA
