// Tile engines: c[m, n] (+)= sum over words of a[m, word] * p[word, n] for one tile, in fp32.
//
// in one or two segments of the contraction (the second is the rank), c with `ldc` floats from row to row.
//
// c is a sum of short chains (chain_words): the rounding error grows with the chain, not with K.
#pragma once

#include "pack.h"

namespace lora_fused::LORA_FUSED_ISA {

// One stretch of the contraction: packed rows times one panel.
struct Segment {
  const u32* a;  // [rows][pitch]
  i64 pitch;     // words from row to row
  const u32* p;  // [words][kPanel]
  i64 words;
  const u32* next = nullptr;  // rows that are wanted soon, contiguous, fetched meanwhile; or null
};

// NOTE: a skinny product waits for its rows. Reading the next tile's rows ahead in the order of memory keeps
// one stream that the hardware follows, where the tile itself reads a page per row.
template <int kLines>
LORA_FUSED_INLINE void prefetch_lines(const u32* p) {
#pragma GCC unroll 32
  for (int i = 0; i < kLines; ++i) _mm_prefetch(reinterpret_cast<const char*>(p + 16 * i), _MM_HINT_T1);
}

template <bool kPairs, int kRows, int kVectors>
LORA_FUSED_INLINE void add_words(const Segment& segment, i64 first, i64 last, Vec (&sum)[kRows][kVectors]) {
  const u32 *a = segment.a, *p = segment.p;
  for (i64 w = first; w < last; ++w) {
    if (kVectors == 1 && segment.next && w % 16 == 0) prefetch_lines<kRows>(segment.next + w * kRows);
    Words b[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) b[v] = words_load(p + w * kPanel + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Words broadcast = words_set1(a[i * segment.pitch + w]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add<kPairs>(broadcast, b[v], sum[i][v]);
    }
  }
}

// Words that one chain of additions spans. NOTE: the rounding error grows with the chain, and with the number
// of chains; these keep fp32 within that of the vendor's GEMM, whose chains are short where rows are few.
// Sums of bf16 pairs are rounded to bf16, where a longer chain does not show.
template <bool kPairs>
LORA_FUSED_INLINE i64 chain_words(i64 words) {
  if (kPairs) return 512;
  return words <= 640 ? 32 : 64;
}

template <int kRows, int kVectors>
LORA_FUSED_INLINE void flush(Vec (&sum)[kRows][kVectors], float* c, i64 ldc, bool accumulate) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + i * ldc + v * kLanes;
      vec_store(to, accumulate ? vec_add(vec_load(to), sum[i][v]) : sum[i][v]);
      sum[i][v] = vec_zero();
    }
}

template <bool kPairs, int kRows, int kVectors>
static void vector_tile(const Segment& first, const Segment& second, float* c, i64 ldc, bool accumulate) {
  Vec sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[i][v] = vec_zero();
  const Segment* const segments[] = {&first, &second};
  const i64 chain = chain_words<kPairs>(first.words + second.words);
  i64 room = chain;
  for (const Segment* segment : segments)
    for (i64 w = 0; w < segment->words;) {
      if (room == 0) {
        flush(sum, c, ldc, accumulate);
        accumulate = true, room = chain;
      }
      const i64 step = min(room, segment->words - w);
      add_words<kPairs>(*segment, w, w + step, sum);
      w += step, room -= step;
    }
  flush(sum, c, ldc, accumulate);
}

using TileFunction = void (*)(const Segment&, const Segment&, float*, i64, bool);

// kRows x 2 accumulators, two panel vectors and a broadcast stay inside the register file (32 zmm or 16 ymm).
template <bool kPairs>
struct VectorEngine {
  static constexpr bool kIsPairs = kPairs;
  static constexpr i64 kRows = kLanes == 16 ? 14 : 6;  // rows of a tile
  static constexpr i64 kDirectRows =
      kLanes == 16 ? 8 : 6;                           // rows of a tile that is read where it is: see gemm.h
  static constexpr i64 kDirectColumns = 2 * kPanel;   // rows are read where they are if the columns are few
  static constexpr i64 kRowPad = 1;                   // packed rows come in multiples of this
  static constexpr i64 kWordPad = 1;                  // packed words come in multiples of this
  static constexpr i64 kBlockWords = 1024;            // contraction block
  static constexpr i64 kPanelBytes = i64{512} << 10;  // panels of one job: a part of the second-level cache
  static constexpr bool kReadsPanels = true;          // the right operand need not be packed: see outer.h
  static constexpr i64 kTurnedTokens = 128;           // at most; their panels of one block fill kPanelBytes
  // Rows up to which b is read where it is, along or across the contraction: see small.h.
  static constexpr i64 kDotRows = 8, kAxpyRows = kPairs ? 4 : 16;

  static void begin() {}
  static void end() {}

  // rows <= kRows, cols <= kPanel: columns behind the first vector are skipped where there are none.
  static void tile(i64 rows, i64 cols, const Segment& first, const Segment& second, float* c, i64 ldc,
                   bool acc) {
    static constexpr Table functions = make_table();
    functions.entry[cols > kLanes][rows - 1](first, second, c, ldc, acc);
  }

 private:
  struct Table {
    TileFunction entry[2][kRows];
  };
  template <int kRow>
  static constexpr void fill(Table& table) {
    table.entry[0][kRow - 1] = vector_tile<kPairs, kRow, 1>;
    table.entry[1][kRow - 1] = vector_tile<kPairs, kRow, 2>;
    if constexpr (kRow > 1) fill<kRow - 1>(table);
  }
  static constexpr Table make_table() {
    Table table{};
    fill<static_cast<int>(kRows)>(table);
    return table;
  }
};

#if defined(__AMX_BF16__)
// 2x2 tile registers of 16x16 fp32 (the best ratio of multiplications to loads that eight registers allow).
struct AmxEngine {
  static constexpr bool kIsPairs = true;
  static constexpr i64 kRows = 32;
  static constexpr i64 kDirectRows = 32;
  static constexpr i64 kDirectColumns = i64{1} << 40;
  static constexpr i64 kRowPad = 16;
  static constexpr i64 kWordPad = 16;
  // NOTE: loading and storing the sums of a block costs as much as 8 of its steps do: few, long blocks.
  static constexpr i64 kBlockWords = 2048;
  static constexpr i64 kPanelBytes = i64{768} << 10;
  static constexpr bool kReadsPanels = false;
  static constexpr i64 kTurnedTokens = 0;  // not measured
  static constexpr i64 kDotRows = 4, kAxpyRows = 4;

  // All eight tile registers: 16 rows of 64 bytes.
  static void begin() {
    alignas(64) unsigned char config[64] = {};
    config[0] = 1;  // palette
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;  // bytes of a row (little endian 16 bit)
      config[48 + t] = 16;      // rows
    }
    _tile_loadconfig(config);
  }
  static void end() { _tile_release(); }

  static void tile(i64 rows, i64 cols, const Segment& first, const Segment& second, float* c, i64 ldc,
                   bool acc) {
    const bool tall = rows > 16, wide = cols > 16;
    if (acc) {
      load(tall, wide, c, ldc);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    multiply(tall, wide, first);
    multiply(tall, wide, second);
    store(tall, wide, c, ldc);
  }

 private:
  LORA_FUSED_INLINE void multiply(bool tall, bool wide, const Segment& segment) {
    if (tall && wide) multiply<true, true>(segment);
    if (tall && !wide) multiply<true, false>(segment);
    if (!tall && wide) multiply<false, true>(segment);
    if (!tall && !wide) multiply<false, false>(segment);
  }
  template <bool kTall, bool kWide>
  LORA_FUSED_INLINE void multiply(const Segment& segment) {
    const i64 a_pitch = segment.pitch * 4, p_pitch = kPanel * 4;
    for (i64 w = 0; w < segment.words; w += 16) {
      const u32 *a = segment.a + w, *p = segment.p + w * kPanel;
      if (!kWide && segment.next) prefetch_lines<kTall ? 32 : 16>(segment.next + w * (kTall ? 32 : 16));
      _tile_loadd(6, p, p_pitch);
      _tile_loadd(4, a, a_pitch);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kWide) {
        _tile_loadd(7, p + 16, p_pitch);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kTall) {
        _tile_loadd(5, a + 16 * segment.pitch, a_pitch);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (kTall && kWide) _tile_dpbf16ps(3, 5, 7);
    }
  }
  LORA_FUSED_INLINE void load(bool tall, bool wide, const float* c, i64 ldc) {
    _tile_loadd(0, c, ldc * 4);
    if (wide) _tile_loadd(1, c + 16, ldc * 4);
    if (tall) _tile_loadd(2, c + 16 * ldc, ldc * 4);
    if (tall && wide) _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
  }
  LORA_FUSED_INLINE void store(bool tall, bool wide, float* c, i64 ldc) {
    _tile_stored(0, c, ldc * 4);
    if (wide) _tile_stored(1, c + 16, ldc * 4);
    if (tall) _tile_stored(2, c + 16 * ldc, ldc * 4);
    if (tall && wide) _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
  }
};
#endif

}  // namespace lora_fused::LORA_FUSED_ISA
