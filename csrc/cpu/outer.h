// Sums of outer products: few rows of y, a long contraction over tokens, b read where it is.
//
//   y[m, n] = sum_k a[m, k] b[k, n]      da: a = ds', b = x;  db': a = s', b = dy;  b contiguous along n
//
// A panel of b is met once, by the few rows of y: packing it would cost as much as the multiplications.
//
//   for each block of tokens: pack a as panels [words][kPanel], columns = rows of y
//     for each strip of four panels of b (copied first where there is a mask, or a part of a panel):
//       for each panel: fetch the next one; multiply it by all rows of y; add to the sums
//
// Threads split the strips; the order of every sum depends on the shapes alone.
#pragma once

#include "epilogue.h"
#include "parallel.h"
#include "scratch.h"

namespace lora_fused::LORA_FUSED_ISA {

// Two vectors of words, as they come out of two rows (pairs) or one, in an order of their own.
struct PanelWords {
  Words first, second;
};

#if defined(__AVX512BF16__)
// Pairs from 32 columns of two rows. NOTE: interleaved inside 128-bit lanes, which costs one instruction a
// vector; in_order() below undoes the order once for all words of a block.
LORA_FUSED_INLINE PanelWords load_panel_pairs(const BFloat16* row, const BFloat16* next_row) {
  const Words a = words_load(row), b = words_load(next_row);
  return {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
}
LORA_FUSED_INLINE void in_order(Vec& first, Vec& second) {
  const Words low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
              high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const Words a = vec_as_words(first), b = vec_as_words(second);
  first = words_as_vec(_mm512_permutex2var_epi64(a, low, b));
  second = words_as_vec(_mm512_permutex2var_epi64(a, high, b));
}
#endif

// The words of one panel: word w, from rows w * kElements and, for pairs, the next.
template <class T, bool kPairs>
LORA_FUSED_INLINE PanelWords load_panel(const T* row, const T* next_row) {
  if constexpr (kPairs) {
    return load_panel_pairs(row, next_row);
  } else {
    return {vec_as_words(vec_load(row)), vec_as_words(vec_load(row + kLanes))};
  }
}

template <class Engine, class T>
class OuterRun {
  static constexpr bool kPairs = Engine::kIsPairs;
  static constexpr i64 kElements = kPairs ? 2 : 1;
  static constexpr i64 kRows = Engine::kRows;  // rows of y at once: sums in registers
  static constexpr i64 kTokens = 128;          // of a block: its panel stays in the first-level cache
  static constexpr i64 kStrip = 4 * kPanel;
  static constexpr i64 kSumBytes = i64{256} << 10;        // of a job: a part of the second-level cache
  static constexpr i64 kCopyPitch = kStrip + 2 * kLanes;  // elements from row to row of a copied strip

 public:
  // Call on one thread, before the parallel region: reserves what the threads share.
  explicit OuterRun(const Gemm& gemm)
      : g(gemm), row_panels(ceil_div(gemm.M, kPanel)), words(ceil_div(gemm.K, kElements)) {
    rows = static_cast<u32*>(scratch(Slot::rows, static_cast<std::size_t>(row_panels * words * kPanel) * 4));
  }

  // Call on every thread of the region.
  void operator()(int thread, int num_threads) {
    if (g.M == 0 || g.N == 0) return;
    const Matrix a = {g.a.data, g.a.col_stride, g.a.row_stride};  // [K, M]
    for (i64 p = row_panels * thread / num_threads; p < row_panels * (thread + 1) / num_threads; ++p)
      pack_panels<T, kPairs>(a, p * kPanel, min(kPanel, g.M - p * kPanel), 0, g.K, words,
                             rows + p * words * kPanel, 0);
    parallel_barrier(num_threads);
    // Jobs are as wide as the cache holds their sums, narrower where threads would be idle.
    const i64 strips = ceil_div(g.N, kStrip), fitting = max(1, kSumBytes / max(1, g.M * kStrip * 4));
    const i64 width = min(fitting, ceil_div(strips, num_threads)), jobs = ceil_div(strips, width);
    for (i64 job = jobs * thread / num_threads; job < jobs * (thread + 1) / num_threads; ++job)
      run_job(job * width * kStrip, min(g.N, (job + 1) * width * kStrip));
  }

 private:
  // One stretch of a panel of b: where it is, or its copy.
  struct Panel {
    const T* data;
    i64 pitch;
  };

  // Columns first..last of y, over all tokens.
  void run_job(i64 first, i64 last) {
    const i64 pitch = round_up(last - first, kPanel);
    float* sums = static_cast<float*>(scratch(Slot::accumulators, static_cast<std::size_t>(g.M * pitch) * 4));
    for (i64 k0 = 0; k0 < g.K; k0 += kTokens)
      for (i64 col = first; col < last; col += kStrip) {
        const bool more = col + kStrip < last, again = k0 + kTokens < g.K;
        const T* next = more    ? at<T>(g.b, k0, col + kStrip)
                        : again ? at<T>(g.b, k0 + kTokens, first)
                                : nullptr;
        run_strip(k0, min(kTokens, g.K - k0), col, min(kStrip, last - col), next, sums + col - first, pitch);
      }
    write_output<T>(g, 0, g.M, first, last - first, sums, pitch);
  }

  // next: the strip that comes after this one.
  void run_strip(i64 k0, i64 tokens, i64 col, i64 cols, const T* next, float* sums, i64 pitch) {
    Panel strip = {at<T>(g.b, k0, col), g.b.row_stride};
    const bool copy = g.drop_b.threshold > 0 || cols % kPanel != 0;
    if (copy) strip = copied(strip, k0, tokens, col, cols);
    for (i64 c = 0; c < cols; c += kPanel) {
      // Wanted next: the panel beside this one. A copy reads all panels of its strip at once, hence that of
      // the strip to come.
      const T* wanted = strip.data + c + kPanel;
      if (copy)
        wanted = next ? next + c : nullptr;
      else if (c + kPanel >= cols)
        wanted = next;
      for (i64 m = 0; m < g.M; m += kPanel)
        multiply(rows + (m / kPanel * words + k0 / kElements) * kPanel, min(kPanel, g.M - m),
                 {strip.data + c, strip.pitch}, tokens, k0 == 0, m == 0 ? wanted : nullptr,
                 sums + m * pitch + c, pitch);
    }
  }

  // The rows of a strip with what the mask drops as zeros. Behind their end there is room for whole panels,
  // whose columns nobody writes out.
  Panel copied(const Panel& strip, i64 k0, i64 tokens, i64 col, i64 cols) {
    T* copy = static_cast<T*>(scratch(Slot::row, static_cast<std::size_t>(kTokens * kCopyPitch) * sizeof(T)));
    u32 bits[kStrip / 32 + kKeepColumns / 32];
    for (i64 i = 0; i < tokens; ++i) {
      T* to = copy + i * kCopyPitch;
      if (g.drop_b.threshold > 0) {
        keep_row(g.drop_b, k0 + i, col, cols, bits);
        drop_row(strip.data + i * strip.pitch, 1, cols, bits, to);
      } else {
        copy_bytes(to, strip.data + i * strip.pitch, cols * sizeof(T));
      }
    }
    return {copy, kCopyPitch};
  }

  // sums[m, 0..kPanel) (+)= rows x panel, as many rows at a time as there are registers.
  void multiply(const u32* a, i64 count, const Panel& b, i64 tokens, bool fresh, const T* next, float* sums,
                i64 pitch) {
    static constexpr Table functions = make_table();
    const i64 tiles = ceil_div(count, kRows);
    for (i64 t = 0; t < tiles; ++t) {
      const i64 m = t * count / tiles, tile_rows = (t + 1) * count / tiles - m;
      functions.entry[tile_rows - 1](a + m, b, tokens, fresh, t == 0 ? next : nullptr, g.b.row_stride,
                                     sums + m * pitch, pitch);
    }
  }

  // Asks for the rows of one word of the next panel.
  LORA_FUSED_INLINE void fetch(const T* row, i64 pitch) {
    constexpr i64 kLine = 64 / sizeof(T);
    for (i64 e = 0; e < kElements; ++e)
      for (i64 c = 0; c < kPanel; c += kLine) prefetch_far(row + e * pitch + c);
  }

  template <int kTileRows>
  static void tile(const u32* a, const Panel& b, i64 tokens, bool fresh, const T* next, i64 next_pitch,
                   float* sums, i64 pitch) {
    alignas(64) static constexpr T kNoRow[kPanel] = {};
    Vec sum[kTileRows][2];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) sum[i][0] = sum[i][1] = vec_zero();
    for (i64 k = 0; k < tokens; k += kElements, a += kPanel) {
      const T *row = b.data + k * b.pitch, *next_row = k + 1 < tokens ? row + b.pitch : kNoRow;
      if (next) fetch(next + k * next_pitch, next_pitch);
      const PanelWords w = load_panel<T, kPairs>(row, next_row);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        const Words factor = words_set1(a[i]);
        sum[i][0] = multiply_add<kPairs>(factor, w.first, sum[i][0]);
        sum[i][1] = multiply_add<kPairs>(factor, w.second, sum[i][1]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      if constexpr (kPairs) in_order(sum[i][0], sum[i][1]);
      for (int v = 0; v < 2; ++v) {
        float* to = sums + i * pitch + v * kLanes;
        vec_store(to, fresh ? sum[i][v] : vec_add(vec_load(to), sum[i][v]));
      }
    }
  }

  struct Table {
    using Function = void (*)(const u32*, const Panel&, i64, bool, const T*, i64, float*, i64);
    Function entry[kRows];
  };
  template <int kRow>
  static constexpr void fill(Table& table) {
    table.entry[kRow - 1] = tile<kRow>;
    if constexpr (kRow > 1) fill<kRow - 1>(table);
  }
  static constexpr Table make_table() {
    Table table{};
    fill<static_cast<int>(kRows)>(table);
    return table;
  }

  const Gemm g;
  const i64 row_panels, words;
  u32* rows;
};

}  // namespace lora_fused::LORA_FUSED_ISA
