// Operands in the form that the tile engines read. A "word" is 32 bits along the contraction: one fp32 value,
// or, for engines that multiply bf16 pairs, two neighbouring bf16 values (the earlier one in the low half).
//
//   rows   [rows][row_pitch]   words of the left operand, one row after the other
//   panel  [words][kPanel]     words of the right operand, kPanel columns side by side
//
// Everything behind the end (rows, columns, words) is zero. Any strides are served; a unit stride is the fast
// case.
#pragma once

#include "keep.h"

namespace lora_fused::LORA_FUSED_ISA {

constexpr i64 kPanel = 2 * kLanes;  // columns of a panel: two vectors

// Element i of a strided run, as a type that pointer arithmetic can use.
template <class T>
LORA_FUSED_INLINE const T* at(const Matrix& m, i64 row, i64 col) {
  return static_cast<const T*>(m.data) + row * m.row_stride + col * m.col_stride;
}

// kElements: elements of type T in one word.
template <class T, bool kPairs>
struct Word {
  static constexpr int kElements = kPairs ? 2 : 1;
  // kLanes words from contiguous elements.
  LORA_FUSED_INLINE Words load(const T* p) {
    if constexpr (kPairs) {
      return words_load(p);
    } else {
      return vec_as_words(vec_load(p));
    }
  }
  LORA_FUSED_INLINE Words load_part(const T* p, i64 elements) {
    if constexpr (kPairs) {
      return words_load_part(p, elements);
    } else {
      return vec_as_words(vec_load_part(p, elements));
    }
  }
  LORA_FUSED_INLINE u32 scalar(const T* p, i64 stride, i64 elements) {
    T pair[2] = {};
    u32 word;
    pair[0] = p[0];
    if constexpr (kPairs) {
      if (elements > 1) pair[1] = p[stride];
      copy_bytes(&word, pair, 4);
    } else {
      const float value = to_float(pair[0]);
      copy_bytes(&word, &value, 4);
    }
    return word;
  }
};

// One row of the left operand: k elements of contraction into `words` words, zeros behind.
template <class T, bool kPairs>
static void pack_row(const T* source, i64 stride, i64 k, i64 words, u32* out) {
  using W = Word<T, kPairs>;
  constexpr i64 kStep = kLanes * W::kElements;
  i64 w = 0;
  if (stride == 1) {
    for (; (w + kLanes) * W::kElements <= k; w += kLanes)
      words_store(out + w, W::load(source + w * W::kElements));
    for (; w < words; w += kLanes) {
      const i64 left = max(0, min(kStep, k - w * W::kElements));
      u32 tail[kLanes];
      words_store(tail, W::load_part(source + w * W::kElements, left));
      copy_bytes(out + w, tail, min(kLanes, words - w) * 4);
    }
    return;
  }
  for (; w < words; ++w) {
    const i64 left = k - w * W::kElements;
    out[w] = left > 0 ? W::scalar(source + w * W::kElements * stride, stride, left) : 0;
  }
}

// Copies one row with the elements that the mask drops as zeros; out has room for a whole vector behind the
// end. `bits` as keep_row leaves them.
template <class T>
static void drop_row(const T* source, i64 stride, i64 cols, const u32* bits, T* out) {
  if (stride != 1) {
    for (i64 c = 0; c < cols; ++c) out[c] = (bits[c / 32] >> (c % 32)) & 1 ? source[c * stride] : T{};
    return;
  }
  constexpr i64 kStep = static_cast<i64>(sizeof(Words) / sizeof(T));
  for (i64 c = 0; c < cols; c += kStep) {
    const u32 keep = bits[c / 32] >> (c % 32);
    if (c + kStep <= cols) {
      words_store(out + c, words_keep<sizeof(T)>(words_load(source + c), keep));
    } else {
      T tail[kStep] = {};
      copy_bytes(tail, source + c, (cols - c) * static_cast<i64>(sizeof(T)));
      words_store(out + c, words_keep<sizeof(T)>(words_load(tail), keep));
    }
  }
}

// Columns col0..col0+cols of the right operand (cols <= kPanel), contraction contiguous in memory: a
// transposition.
template <class T, bool kPairs>
static void pack_panel_transposed(const Matrix& m, i64 col0, i64 cols, i64 k0, i64 k, i64 words, u32* out) {
  using W = Word<T, kPairs>;
  for (i64 w = 0; w < words; w += kLanes) {
    const i64 elements = k - w * W::kElements;
    const i64 store = min(kLanes, words - w);
    for (i64 half = 0; half < 2; ++half) {
      Words rows[kLanes];
      const bool whole = cols >= (half + 1) * kLanes && elements >= kLanes * W::kElements;
      const T* source = at<T>(m, k0 + w * W::kElements, col0 + half * kLanes);
      if (whole) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) rows[i] = W::load(source + i * m.col_stride);
      } else {
        for (int i = 0; i < kLanes; ++i) {
          const bool inside = half * kLanes + i < cols && elements > 0;
          rows[i] = inside ? W::load_part(source + i * m.col_stride, elements) : words_zero();
        }
      }
      transpose(rows);
      for (i64 i = 0; i < store; ++i) words_store(out + (w + i) * kPanel + half * kLanes, rows[i]);
    }
  }
}

// kLanes columns of one word (two rows of bf16, or one row), n of them real, contiguous along the columns.
template <class T, bool kPairs>
LORA_FUSED_INLINE void pack_word_straight(const T* row, const T* next_row, i64 n, u32* out) {
  if constexpr (kPairs) {
    words_store(out, interleave_pairs(row, next_row, n));
  } else {
    words_store(out, vec_as_words(vec_load_part(row, n)));
  }
}

// Columns col0..col0+cols into panels `panel_pitch` words apart, contiguous in memory along the columns: a
// few panels at a time, so that each row is read in stretches of some cache lines.
template <class T, bool kPairs>
static void pack_panels_straight(const Matrix& m, i64 col0, i64 cols, i64 k0, i64 k, i64 words, u32* out,
                                 i64 panel_pitch) {
  constexpr i64 kElements = Word<T, kPairs>::kElements;
  constexpr i64 kStretch = 4 * kPanel, kAhead = 8;
  const T zeros[kPanel] = {};
  for (i64 begin = 0; begin < cols; begin += kStretch) {
    const i64 end = min(cols, begin + kStretch);
    for (i64 w = 0; w < words; ++w) {
      const bool inside = w * kElements < k, pair = w * kElements + 1 < k;
      const T* row = at<T>(m, k0 + w * kElements, col0);
      for (i64 c = begin; c < end; c += kPanel) {
        u32* to = out + c / kPanel * panel_pitch + w * kPanel;
        const T *a = inside ? row + c : zeros, *b = pair ? row + c + m.row_stride : zeros;
        if (inside) prefetch(a + kAhead * kElements * m.row_stride);
        if (kPairs && inside) prefetch(a + (kAhead * kElements + 1) * m.row_stride);
        pack_word_straight<T, kPairs>(a, b, min(kLanes, end - c), to);
        pack_word_straight<T, kPairs>(a + kLanes, b + kLanes, max(0, min(kLanes, end - c - kLanes)),
                                      to + kLanes);
      }
    }
  }
}

template <class T, bool kPairs>
static void pack_panel_strided(const Matrix& m, i64 col0, i64 cols, i64 k0, i64 k, i64 words, u32* out) {
  using W = Word<T, kPairs>;
  zero_bytes(out, words * kPanel * 4);
  for (i64 w = 0; w * W::kElements < k; ++w)
    for (i64 c = 0; c < cols; ++c)
      out[w * kPanel + c] =
          W::scalar(at<T>(m, k0 + w * W::kElements, col0 + c), m.row_stride, k - w * W::kElements);
}

// Panels of the right operand, `panel_pitch` words apart: contraction k0..k0+k, columns col0..col0+cols.
template <class T, bool kPairs>
static void pack_panels(const Matrix& m, i64 col0, i64 cols, i64 k0, i64 k, i64 words, u32* out,
                        i64 panel_pitch) {
  if (m.col_stride == 1)
    return pack_panels_straight<T, kPairs>(m, col0, cols, k0, k, words, out, panel_pitch);
  for (i64 c = 0; c < cols; c += kPanel) {
    u32* panel = out + c / kPanel * panel_pitch;
    if (m.row_stride == 1)
      pack_panel_transposed<T, kPairs>(m, col0 + c, min(kPanel, cols - c), k0, k, words, panel);
    else
      pack_panel_strided<T, kPairs>(m, col0 + c, min(kPanel, cols - c), k0, k, words, panel);
  }
}

// Rows row0..row0+rows of the left operand where a column is contiguous in memory (row_stride 1): a
// transposition.
template <class T, bool kPairs>
static void pack_rows_transposed(const Matrix& m, i64 row0, i64 rows, i64 k, i64 words, u32* out, i64 pitch) {
  for (i64 i = 0; i < rows; i += kPanel) {
    const i64 count = min(kPanel, rows - i);
    for (i64 w = 0; w < words; w += kLanes) {
      constexpr i64 kElements = Word<T, kPairs>::kElements;
      const i64 step = min(kLanes, words - w), left = max(0, min(kLanes * kElements, k - w * kElements));
      u32 block[kLanes * kPanel];
      pack_panels_straight<T, kPairs>({m.data, m.col_stride, 1}, row0 + i, count, w * kElements, left, kLanes,
                                      block, 0);
      for (i64 half = 0; half < 2; ++half) {
        Words lanes[kLanes];
        for (int j = 0; j < kLanes; ++j) lanes[j] = words_load(block + j * kPanel + half * kLanes);
        transpose(lanes);
        for (i64 j = 0; j < min(kLanes, count - half * kLanes); ++j) {
          u32 row[kLanes];
          words_store(row, lanes[j]);
          copy_bytes(out + (i + half * kLanes + j) * pitch + w, row, step * 4);
        }
      }
    }
  }
}

}  // namespace lora_fused::LORA_FUSED_ISA
