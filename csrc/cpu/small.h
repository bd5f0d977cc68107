// Products with few rows, or with a short contraction: nothing is packed, b is read once where it is.
//
//   dot:   b is contiguous along the contraction (forward of a few tokens, shrink): rows of a times columns
//          of b
//   axpy:  b is contiguous along the columns (dx of a few tokens, the gradients of adapters): sums of scaled
//          rows of b
#pragma once

#include "epilogue.h"
#include "parallel.h"
#include "scratch.h"

namespace lora_fused::LORA_FUSED_ISA {

constexpr i64 kFewSkinnyRows = 32;   // measured: from 33 on packing a skinny operand pays
constexpr i64 kSkinny = 64;          // columns of a skinny operand
constexpr i64 kFewRowsOfPacked = 4;  // more rows take panels where they are ready-made
constexpr i64 kShortContraction = 16;
constexpr i64 kInCacheBytes = i64{8} << 20;  // a larger b is not still in a cache since the last call

// NOTE: the rows of b that are wanted next are fetched into the second-level cache while the present ones are
// added: within a row the hardware looks ahead, from row to row it cannot. In the cache that only costs.
template <class T>
LORA_FUSED_INLINE bool is_far(const Gemm& g) {
  return g.K * g.N * static_cast<i64>(sizeof(T)) > kInCacheBytes;
}

template <class Engine>
LORA_FUSED_INLINE bool is_dot(const Gemm& g) {
  const bool few = g.M <= Engine::kDotRows || (g.M <= kFewSkinnyRows && g.N <= kSkinny);
  if (g.packed && g.M > kFewRowsOfPacked) return false;
  const bool plain = g.drop_a.threshold == 0 && g.drop_b.threshold == 0 && g.drop_rank.threshold == 0;
  return few && plain && g.a.col_stride == 1 && g.b.row_stride == 1 && g.y.col_stride == 1 && g.K > 0 &&
         (g.R == 0 || (g.s.col_stride == 1 && (g.l.row_stride == 1 || g.l.col_stride == 1)));
}

template <class Engine>
LORA_FUSED_INLINE bool is_axpy(const Gemm& g) {
  if (g.packed && g.M > kFewRowsOfPacked) return false;
  const bool few = g.M <= Engine::kAxpyRows;
  return (few || g.K <= kShortContraction) && g.drop_a.threshold == 0 && g.b.col_stride == 1 && g.K > 0 &&
         (g.R == 0 || g.l.col_stride == 1 || (few && g.l.row_stride == 1));
}

LORA_FUSED_INLINE float sum_lanes(Vec v) {
  float lanes[kLanes], total = 0;
  vec_store(lanes, v);
  // Halves, so that the order is a tree.
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  total = lanes[0];
  return total;
}

template <class T, bool kPairs>
class DotRun {
  using W = Word<T, kPairs>;
  static constexpr i64 kStep = kLanes * W::kElements;
  static constexpr i64 kRowsAtOnce = 4;
  static constexpr i64 kColumns = 8;  // columns of b side by side: as many streams from memory
  static constexpr i64 kChain =
      2048;  // elements between two additions across the lanes: rounding grows with the chain

 public:
  explicit DotRun(const Gemm& gemm) : g(gemm) {}

  void operator()(int thread, int num_threads) {
    const i64 groups = ceil_div(g.N, kColumns);
    for (i64 group = groups * thread / num_threads; group < groups * (thread + 1) / num_threads; ++group) {
      const i64 n = group * kColumns, cols = min(kColumns, g.N - n);
      for (i64 m = 0; m < g.M; m += kRowsAtOnce) {
        const i64 rows = min(kRowsAtOnce, g.M - m);
        alignas(64) float out[kRowsAtOnce * kLanes] = {};
        if (cols == kColumns)
          by_rows<kColumns>(m, rows, n, out);
        else
          for (i64 c = 0; c < cols; ++c) by_rows<1>(m, rows, n + c, out + c);
        if (g.R > 0 && g.l.row_stride != 1) add_rank_across(m, rows, n, cols, out);
        write_output<T>(g, m, rows, n, cols, out, kLanes);
      }
    }
  }

 private:
  template <int kCols>
  void by_rows(i64 m, i64 rows, i64 n, float* out) {
    switch (rows) {
      case 1:
        return block<1, kCols>(m, n, out);
      case 2:
        return block<2, kCols>(m, n, out);
      case 3:
        return halves<3, kCols>(m, n, out);
      default:
        return halves<4, kCols>(m, n, out);
    }
  }

  // Half the columns at a time: the sums of all of them would not fit into the registers.
  template <int kRows, int kCols>
  void halves(i64 m, i64 n, float* out) {
    constexpr int kHalf = kCols > 1 ? kCols / 2 : 1;
    for (int c = 0; c < kCols; c += kHalf) block<kRows, kHalf>(m, n + c, out + c);
  }

  // The rank term where l is contiguous along the columns: out[i, c] += sum_r s[m + i, r] l[r, n + c].
  void add_rank_across(i64 m, i64 rows, i64 n, i64 cols, float* out) {
    static_assert(kColumns <= kLanes, "the columns of a group are part of one vector");
    for (i64 i = 0; i < rows; ++i) {
      const T* s = at<T>(g.s, m + i, 0);
      Vec sum = vec_zero();
      for (i64 r = 0; r < g.R; ++r)
        sum = vec_fma(vec_set1(to_float(s[r])), vec_load_part(at<T>(g.l, r, n), cols), sum);
      vec_store(out + i * kLanes, vec_add(vec_load(out + i * kLanes), sum));
    }
  }

  template <int kRows, int kCols>
  void block(i64 m, i64 n, float* out) {
    is_far<T>(g) ? block<kRows, kCols, true>(m, n, out) : block<kRows, kCols, false>(m, n, out);
  }

  template <int kRows, int kCols, bool kFar>
  void block(i64 m, i64 n, float* out) {
    Vec sum[kRows][kCols];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) sum[i][c] = vec_zero();
    i64 k = 0;
    for (; k + kChain < g.K; k += kChain) {
      add<kRows, kCols, kFar>(at<T>(g.a, m, k), g.a.row_stride, at<T>(g.b, k, n), g.b.col_stride, kChain,
                              sum);
      flush<kRows, kCols>(sum, out);
    }
    add<kRows, kCols, kFar>(at<T>(g.a, m, k), g.a.row_stride, at<T>(g.b, k, n), g.b.col_stride, g.K - k, sum);
    if (g.R > 0 && g.l.row_stride == 1)
      add<kRows, kCols, false>(at<T>(g.s, m, 0), g.s.row_stride, at<T>(g.l, 0, n), g.l.col_stride, g.R, sum);
    flush<kRows, kCols>(sum, out);
  }

  template <int kRows, int kCols>
  LORA_FUSED_INLINE void flush(Vec (&sum)[kRows][kCols], float* out) {
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) {
        out[i * kLanes + c] += sum_lanes(sum[i][c]);
        sum[i][c] = vec_zero();
      }
  }

  template <int kRows, int kCols, bool kFar>
  LORA_FUSED_INLINE void add(const T* a, i64 a_stride, const T* b, i64 b_stride, i64 k,
                             Vec (&sum)[kRows][kCols]) {
    i64 i = 0;
    for (; i + kStep <= k; i += kStep) step<kRows, kCols, kFar>(a + i, a_stride, b + i, b_stride, kStep, sum);
    if (i < k) step<kRows, kCols, kFar>(a + i, a_stride, b + i, b_stride, k - i, sum);
  }

  template <int kRows, int kCols, bool kFar>
  LORA_FUSED_INLINE void step(const T* a, i64 a_stride, const T* b, i64 b_stride, i64 count,
                              Vec (&sum)[kRows][kCols]) {
    Words row[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
      row[i] = count == kStep ? W::load(a + i * a_stride) : W::load_part(a + i * a_stride, count);
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) {
      const T* column = b + c * b_stride;
      if (kFar) prefetch_far(column + kCols * b_stride);
      const Words w = count == kStep ? W::load(column) : W::load_part(column, count);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[i][c] = multiply_add<kPairs>(row[i], w, sum[i][c]);
    }
  }

  const Gemm g;
};

template <class T>
class AxpyRun {
  static constexpr i64 kChunk = 1024;      // columns whose sums stay in the first-level cache
  static constexpr i64 kFewChunk = 4096;   // and where rows are few: long stretches of each row of b
  static constexpr i64 kTerms = 32;        // rows of b side by side: as many streams from memory
  static constexpr i64 kFewTerms = 8;      // and where rows are few: no more than a set of the cache has ways
  static constexpr i64 kBlockTerms = 256;  // between two additions to the sums: rounding grows with the chain
  static constexpr i64 kRowsAtOnce = 4, kGroup = kLanes;

 public:
  explicit AxpyRun(const Gemm& gemm)
      : g(gemm), few(gemm.M <= kRowsAtOnce && gemm.drop_b.threshold == 0), far(few && is_far<T>(gemm)) {}

  void operator()(int thread, int num_threads) {
    // Narrower chunks where threads would be idle; a multiple of the columns that one mask step covers.
    const i64 chunk =
        min(few ? kFewChunk : kChunk, round_up(max(1, ceil_div(g.N, num_threads)), kKeepColumns));
    const i64 chunks = ceil_div(g.N, chunk);
    for (i64 i = chunks * thread / num_threads; i < chunks * (thread + 1) / num_threads; ++i)
      for (i64 m = 0; m < g.M; m += kGroup)
        run_chunk(m, min(kGroup, g.M - m), i * chunk, min(chunk, g.N - i * chunk));
  }

 private:
  void run_chunk(i64 m, i64 rows, i64 col0, i64 cols) {
    const i64 pitch = round_up(cols, kLanes), floats = rows * pitch;
    float* sum = static_cast<float*>(scratch(Slot::accumulators, static_cast<std::size_t>(2 * floats) * 4));
    float* part = sum + floats;
    zero_bytes(sum, floats * 4);
    for (i64 j = 0; j < g.K; j += kBlockTerms) {
      float* to = g.K <= kBlockTerms ? sum : part;
      if (to == part) zero_bytes(part, floats * 4);
      add_terms(g.a, g.b, g.drop_b, j, min(kBlockTerms, g.K - j), m, rows, col0, cols, to, pitch);
      if (to == part) add_part(sum, part, floats);
    }
    if (g.R > 0 && g.drop_rank.threshold == 0) add_rank(m, rows, col0, cols, sum, pitch);
    if (g.R > 0 && g.drop_rank.threshold > 0) {
      zero_bytes(part, floats * 4);
      add_rank(m, rows, col0, cols, part, pitch);
      add_kept(g.drop_rank, m, rows, col0, cols, part, sum, pitch);
    }
    write_output<T>(g, m, rows, col0, cols, sum, pitch);
  }

  static void add_part(float* sum, const float* part, i64 floats) {
    for (i64 c = 0; c < floats; c += kLanes)
      vec_store(sum + c, vec_add(vec_load(sum + c), vec_load(part + c)));
  }

  void add_rank(i64 m, i64 rows, i64 col0, i64 cols, float* sum, i64 pitch) {
    if (g.l.col_stride == 1) return add_terms(g.s, g.l, {}, 0, g.R, m, rows, col0, cols, sum, pitch);
    add_rank_along(m, rows, col0, cols, sum, pitch);
  }

  // The rank term where l is contiguous along the rank: panels of it are transposed as they are met.
  void add_rank_along(i64 m, i64 rows, i64 col0, i64 cols, float* sum, i64 pitch) {
    constexpr i64 kBlock = kTerms;
    u32 panel[kBlock * kPanel];
    for (i64 c = 0; c < cols; c += kPanel)
      for (i64 r0 = 0; r0 < g.R; r0 += kBlock) {
        const i64 count = min(kBlock, g.R - r0), valid = min(kPanel, cols - c);
        pack_panel_transposed<T, false>(g.l, col0 + c, valid, r0, count, count, panel);
        for (i64 i = 0; i < rows; ++i)
          for (i64 v = 0; v < valid; v += kLanes) {
            Vec term = vec_zero();
            for (i64 r = 0; r < count; ++r)
              term = vec_fma(vec_set1(to_float(*at<T>(g.s, m + i, r0 + r))),
                             words_as_vec(words_load(panel + r * kPanel + v)), term);
            float* to = sum + i * pitch + c + v;
            vec_store(to, vec_add(vec_load(to), term));
          }
      }
  }

  // sum[i, c] += sum_j a[m + i, j] b[j, col0 + c] over j0 <= j < j0 + terms
  void add_terms(const Matrix& a, const Matrix& b, const Dropout& drop_b, i64 j0, i64 terms, i64 m, i64 rows,
                 i64 col0, i64 cols, float* sum, i64 pitch) {
    const bool masked = drop_b.threshold > 0;
    T* kept = static_cast<T*>(scratch(
        Slot::row, static_cast<std::size_t>(masked ? kTerms * (kChunk + 2 * kLanes) : 0) * sizeof(T)));
    const i64 at_once = few ? kFewTerms : kTerms;
    for (i64 j = j0; j < j0 + terms; j += at_once) {
      const i64 count = min(at_once, j0 + terms - j);
      const T* first = at<T>(b, j, col0);
      i64 stride = b.row_stride;
      if (masked) {
        stride = kChunk + 2 * kLanes;
        keep_terms(drop_b, j, count, col0, cols, first, b.row_stride, kept, stride);
        first = kept;
      }
      for (i64 i = 0; i < rows; i += kRowsAtOnce) {
        float factors[kRowsAtOnce][kTerms] = {};
        for (i64 r = 0; r < min(kRowsAtOnce, rows - i); ++r)
          for (i64 t = 0; t < count; ++t) factors[r][t] = to_float(*at<T>(a, m + i + r, j + t));
        add_group(factors, min(kRowsAtOnce, rows - i), first, stride, count, cols, sum + i * pitch, pitch);
      }
    }
  }

  void keep_terms(const Dropout& dropout, i64 j, i64 count, i64 col0, i64 cols, const T* from,
                  i64 from_stride, T* to, i64 to_stride) {
    u32 bits[(kChunk + kKeepColumns) / 32];
    for (i64 t = 0; t < count; ++t) {
      keep_row(dropout, j + t, col0, cols, bits);
      drop_row(from + t * from_stride, 1, cols, bits, to + t * to_stride);
    }
  }

  void add_group(const float (&factors)[kRowsAtOnce][kTerms], i64 rows, const T* b, i64 stride, i64 count,
                 i64 cols, float* sum, i64 pitch) {
    switch (rows) {
      case 1:
        return add_rows<1>(factors, b, stride, count, cols, sum, pitch);
      case 2:
        return add_rows<2>(factors, b, stride, count, cols, sum, pitch);
      case 3:
        return add_rows<3>(factors, b, stride, count, cols, sum, pitch);
      default:
        return add_rows<4>(factors, b, stride, count, cols, sum, pitch);
    }
  }

  template <int kRows>
  void add_rows(const float (&factors)[kRowsAtOnce][kTerms], const T* b, i64 stride, i64 count, i64 cols,
                float* sum, i64 pitch) {
    far ? add_rows<kRows, true>(factors, b, stride, count, cols, sum, pitch)
        : add_rows<kRows, false>(factors, b, stride, count, cols, sum, pitch);
  }

  // NOTE: several vectors side by side where rows are few: one chain of additions alone would wait for
  // itself.
  template <int kRows, bool kFar>
  void add_rows(const float (&factors)[kRowsAtOnce][kTerms], const T* b, i64 stride, i64 count, i64 cols,
                float* sum, i64 pitch) {
    constexpr int kVectors = kRows == 1 ? 4 : 2;
    i64 c = 0;
    for (; c + kVectors * kLanes <= cols; c += kVectors * kLanes)
      add_vectors<kRows, kVectors, kFar>(factors, b + c, stride, count, kLanes, sum + c, pitch);
    for (; c < cols; c += kLanes)
      add_vectors<kRows, 1, kFar>(factors, b + c, stride, count, min(kLanes, cols - c), sum + c, pitch);
  }

  // `valid`: elements of each vector that exist.
  template <int kRows, int kVectors, bool kFar>
  LORA_FUSED_INLINE void add_vectors(const float (&factors)[kRowsAtOnce][kTerms], const T* b, i64 stride,
                                     i64 count, i64 valid, float* sum, i64 pitch) {
    Vec v[kRows][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) v[i][j] = vec_zero();
    for (i64 t = 0; t < count; ++t) {
      const T* p = b + t * stride;
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const T* from = p + j * kLanes;
        if (kFar) prefetch_far(from + kFewTerms * stride);
        const Vec w = valid == kLanes ? vec_load(from) : vec_load_part(from, valid);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) v[i][j] = vec_fma(vec_set1(factors[i][t]), w, v[i][j]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        float* to = sum + i * pitch + j * kLanes;
        vec_store(to, vec_add(vec_load(to), v[i][j]));
      }
  }

  const Gemm g;
  const bool few, far;
};

}  // namespace lora_fused::LORA_FUSED_ISA
