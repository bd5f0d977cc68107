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

template <class Engine>
LORA_FUSED_INLINE bool is_dot(const Gemm& g) {
  const bool few = g.M <= Engine::kDotRows || (g.M <= kFewSkinnyRows && g.N <= kSkinny);
  if (g.packed && g.M > kFewRowsOfPacked) return false;
  const bool plain = g.drop_a.threshold == 0 && g.drop_b.threshold == 0 && g.drop_rank.threshold == 0;
  return few && plain && g.a.col_stride == 1 && g.b.row_stride == 1 && g.y.col_stride == 1 && g.K > 0 &&
         (g.R == 0 || (g.s.col_stride == 1 && g.l.row_stride == 1));
}

template <class Engine>
LORA_FUSED_INLINE bool is_axpy(const Gemm& g) {
  if (g.packed && g.M > kFewRowsOfPacked) return false;
  return (g.M <= Engine::kAxpyRows || g.K <= kShortContraction) && g.drop_a.threshold == 0 &&
         g.b.col_stride == 1 && g.K > 0 && (g.R == 0 || g.l.col_stride == 1);
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
  static constexpr i64 kAhead = 512;  // bytes
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

  template <int kRows, int kCols>
  void block(i64 m, i64 n, float* out) {
    Vec sum[kRows][kCols];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < kCols; ++c) sum[i][c] = vec_zero();
    i64 k = 0;
    for (; k + kChain < g.K; k += kChain) {
      add<kRows, kCols>(at<T>(g.a, m, k), g.a.row_stride, at<T>(g.b, k, n), g.b.col_stride, kChain, sum);
      flush<kRows, kCols>(sum, out);
    }
    add<kRows, kCols>(at<T>(g.a, m, k), g.a.row_stride, at<T>(g.b, k, n), g.b.col_stride, g.K - k, sum);
    if (g.R > 0)
      add<kRows, kCols>(at<T>(g.s, m, 0), g.s.row_stride, at<T>(g.l, 0, n), g.l.col_stride, g.R, sum);
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

  template <int kRows, int kCols>
  LORA_FUSED_INLINE void add(const T* a, i64 a_stride, const T* b, i64 b_stride, i64 k,
                             Vec (&sum)[kRows][kCols]) {
    i64 i = 0;
    for (; i + kStep <= k; i += kStep) step<kRows, kCols>(a + i, a_stride, b + i, b_stride, kStep, sum);
    if (i < k) step<kRows, kCols>(a + i, a_stride, b + i, b_stride, k - i, sum);
  }

  template <int kRows, int kCols>
  LORA_FUSED_INLINE void step(const T* a, i64 a_stride, const T* b, i64 b_stride, i64 count,
                              Vec (&sum)[kRows][kCols]) {
    Words row[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
      row[i] = count == kStep ? W::load(a + i * a_stride) : W::load_part(a + i * a_stride, count);
#pragma GCC unroll 8
    for (int c = 0; c < kCols; ++c) {
      const T* column = b + c * b_stride;
      prefetch(reinterpret_cast<const char*>(column) + kAhead);
      const Words w = count == kStep ? W::load(column) : W::load_part(column, count);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[i][c] = multiply_add<kPairs>(row[i], w, sum[i][c]);
    }
  }

  const Gemm g;
};

template <class T>
class AxpyRun {
  static constexpr i64 kChunk = 1024;  // columns whose sums stay in the first-level cache
  static constexpr i64 kTerms = 32;    // rows of b side by side: as many streams from memory
  static constexpr i64 kRowsAtOnce = 4, kGroup = kLanes;
  static constexpr i64 kAhead = 512;  // bytes

 public:
  explicit AxpyRun(const Gemm& gemm) : g(gemm) {}

  void operator()(int thread, int num_threads) {
    // Narrower chunks where threads would be idle; a multiple of the columns that one mask step covers.
    const i64 chunk = min(kChunk, round_up(max(1, ceil_div(g.N, num_threads)), kKeepColumns));
    const i64 chunks = ceil_div(g.N, chunk);
    for (i64 i = chunks * thread / num_threads; i < chunks * (thread + 1) / num_threads; ++i)
      for (i64 m = 0; m < g.M; m += kGroup)
        run_chunk(m, min(kGroup, g.M - m), i * chunk, min(chunk, g.N - i * chunk));
  }

 private:
  void run_chunk(i64 m, i64 rows, i64 col0, i64 cols) {
    const i64 pitch = round_up(cols, kLanes), bytes = kGroup * pitch * 4;
    float* sum = static_cast<float*>(scratch(Slot::accumulators, static_cast<std::size_t>(2 * bytes)));
    zero_bytes(sum, bytes);
    add_terms(g.a, g.b, g.drop_b, g.K, m, rows, col0, cols, sum, pitch);
    if (g.R > 0 && g.drop_rank.threshold == 0) add_terms(g.s, g.l, {}, g.R, m, rows, col0, cols, sum, pitch);
    if (g.R > 0 && g.drop_rank.threshold > 0) {
      float* rank_sum = sum + kGroup * pitch;
      zero_bytes(rank_sum, bytes);
      add_terms(g.s, g.l, {}, g.R, m, rows, col0, cols, rank_sum, pitch);
      add_kept(g.drop_rank, m, rows, col0, cols, rank_sum, sum, pitch);
    }
    write_output<T>(g, m, rows, col0, cols, sum, pitch);
  }

  // sum[i, c] += sum_j a[m + i, j] b[j, col0 + c]
  void add_terms(const Matrix& a, const Matrix& b, const Dropout& drop_b, i64 terms, i64 m, i64 rows,
                 i64 col0, i64 cols, float* sum, i64 pitch) {
    const bool masked = drop_b.threshold > 0;
    T* kept = static_cast<T*>(scratch(
        Slot::row, static_cast<std::size_t>(masked ? kTerms * (kChunk + 2 * kLanes) : 0) * sizeof(T)));
    // NOTE: few rows wait for memory: more streams than a set of the cache has ways would evict each other.
    const i64 at_once = g.M <= kRowsAtOnce ? kTerms / 2 : kTerms;
    for (i64 j = 0; j < terms; j += at_once) {
      const i64 count = min(at_once, terms - j);
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

  // NOTE: several vectors side by side where rows are few: one chain of additions alone would wait for
  // itself.
  template <int kRows>
  void add_rows(const float (&factors)[kRowsAtOnce][kTerms], const T* b, i64 stride, i64 count, i64 cols,
                float* sum, i64 pitch) {
    constexpr int kVectors = kRows == 1 ? 4 : 2;
    i64 c = 0;
    for (; c + kVectors * kLanes <= cols; c += kVectors * kLanes)
      add_vectors<kRows, kVectors>(factors, b + c, stride, count, kLanes, sum + c, pitch);
    for (; c < cols; c += kLanes)
      add_vectors<kRows, 1>(factors, b + c, stride, count, min(kLanes, cols - c), sum + c, pitch);
  }

  // `valid`: elements of each vector that exist.
  template <int kRows, int kVectors>
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
        prefetch(reinterpret_cast<const char*>(from) + kAhead);
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
};

}  // namespace lora_fused::LORA_FUSED_ISA
