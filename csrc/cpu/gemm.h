// The one loop nest behind matmul, shrink and reduce:
//
//   y = a b + rank term, see struct Gemm in epilogue.h
//
//   rows of a are packed once for a chunk of M (shared by all threads)
//   a job takes some strips of four panels:  for each contraction block: pack their panels of b,
//                                              for each row tile, for each strip: multiply; after the last
//                                              block: finish
//   finish appends the rank-R term as R more contraction steps and writes y, rounded once
//
// Few tokens against a weight that lies along the contraction: the product is turned (see turn() in run.cpp),
// so that a is the weight, whose rows are read or copied as they are, and b the few tokens, packed for all.
// A job is then a group of rows of a, all columns.
//
// Threads split the jobs; the order of every sum depends on the shapes alone, so results do not depend on
// threads.
#pragma once

#include "engine.h"
#include "epilogue.h"
#include "parallel.h"
#include "scratch.h"

namespace lora_fused::LORA_FUSED_ISA {

constexpr i64 kMaxPackedRows = i64{8} << 20;  // bytes
constexpr i64 kTurnedRows = 112;  // rows of a job of a turned product: whole tiles, and whole vectors of y
constexpr i64 kTokenBlockWords = 128;  // over tokens: panels that stay in the first-level cache (measured)
constexpr i64 kRowPitchPad = 16;       // words; keeps equal columns of different rows out of one cache set

// Words of a contraction of k elements, padded for the engine.
template <class Engine>
LORA_FUSED_INLINE i64 padded_words(i64 k) {
  return round_up(Engine::kIsPairs ? ceil_div(k, 2) : k, Engine::kWordPad);
}

template <class Engine, class T>
class GemmRun {
  static constexpr bool kPairs = Engine::kIsPairs;
  static constexpr i64 kElements = kPairs ? 2 : 1;
  static constexpr i64 kStrip = 4 * kPanel;  // columns that are finished together
  static constexpr i64 kTile = Engine::kRows * kStrip;
  static constexpr bool kReadsWords =
      sizeof(T) * kElements == 4;  // elements of T are words as they are in memory

 public:
  // Call on one thread, before the parallel region: reserves what the threads share.
  explicit GemmRun(const Gemm& gemm) : g(gemm) {
    words = padded_words<Engine>(g.K);
    rank_words = padded_words<Engine>(g.R);
    pitch = words + kRowPitchPad;
    rank_pitch = rank_words + kRowPitchPad;
    const i64 fitting = kMaxPackedRows / (pitch * 4) / Engine::kRows * Engine::kRows;
    chunk = g.turned ? g.M : min(max(fitting, Engine::kRows), round_up(g.M, Engine::kRows));
    // Tiles read kRows rows whatever they keep, hence the room behind the last one.
    if (!g.turned)
      rows = static_cast<u32*>(
          scratch(Slot::rows, static_cast<std::size_t>((chunk + Engine::kRows) * pitch) * 4));
    rank_rows = static_cast<u32*>(
        scratch(Slot::rank_rows, static_cast<std::size_t>((chunk + Engine::kRows) * rank_pitch) * 4));
    // Few columns: packing the rows would cost more than it saves. Words must be whole and aligned as they
    // stand.
    direct = kReadsWords && (g.turned || g.N <= Engine::kDirectColumns) && g.a.col_stride == 1 &&
             g.drop_a.threshold == 0 && g.K % (Engine::kWordPad * kElements) == 0 &&
             g.a.row_stride % kElements == 0 && reinterpret_cast<std::uintptr_t>(g.a.data) % 4 == 0;
    // One panel needs no blocks: it stays in the cache, and whole rows are read in the order of memory. NOTE:
    // a turned product takes the blocks of one that is not, so that a row does not depend on how many there
    // are.
    const i64 limit = g.over_tokens                ? kTokenBlockWords
                      : g.N <= kPanel && !g.turned ? words
                                                   : Engine::kBlockWords;
    blocks = max(1, ceil_div(words, max(1, limit)));
    block_words = max(16, round_up(ceil_div(words, blocks), 16));
    // NOTE: rows whose distance is a power of two share one set of the first-level cache (8 to 12 ways); more
    // of them than ways would evict a line before its words are used.
    tile_rows = direct ? Engine::kDirectRows : Engine::kRows;
  }

  // Call on every thread of the region.
  void operator()(int thread, int num_threads) {
    if (g.M == 0 || g.N == 0) return;
    Engine::begin();
    for (i64 m0 = 0; m0 < g.M; m0 += chunk) {
      const i64 height = height_of(m0);
      if (m0 > 0) parallel_barrier(num_threads);
      parallel_step([&] { pack_rows(m0, height, thread, num_threads); });
      parallel_barrier(num_threads);
      parallel_step([&] { run_jobs(m0, height, thread, num_threads); });
    }
    Engine::end();
  }

 private:
  void run_jobs(i64 m0, i64 height, int thread, int num_threads) {
    const i64 strips = ceil_div(g.N, kStrip), tiles = ceil_div(height, tile_rows);
    if (g.turned) return run_turned_jobs(tiles, thread, num_threads);
    // Jobs are as wide as the cache holds their panels, narrower where threads would be idle; where there
    // are too few strips, tiles are split as well, and each split packs the panels again.
    const i64 fitting = max(1, Engine::kPanelBytes / (block_words * kStrip * 4));
    const i64 width = min(fitting, ceil_div(strips, num_threads));
    const i64 groups = ceil_div(strips, width), splits = min(tiles, ceil_div(num_threads, groups));
    const i64 jobs = groups * splits;
    for (i64 job = jobs * thread / num_threads; job < jobs * (thread + 1) / num_threads; ++job) {
      const i64 col0 = job / splits * width * kStrip, split = job % splits;
      run_job(m0, tiles, col0, min(width * kStrip, g.N - col0), tiles * split / splits,
              tiles * (split + 1) / splits);
    }
  }

  void run_turned_jobs(i64 tiles, int thread, int num_threads) {
    const i64 group = kTurnedRows / tile_rows, jobs = ceil_div(tiles, group);
    for (i64 job = jobs * thread / num_threads; job < jobs * (thread + 1) / num_threads; ++job)
      run_job(0, tiles, 0, g.N, job * group, min(tiles, (job + 1) * group));
  }

  // First row of tile t: tiles as even as they can be, or whole where rows come in larger steps.
  i64 tile_row(i64 t, i64 tiles, i64 height) {
    return Engine::kRowPad > 1 || g.turned ? min(t * tile_rows, height) : t * height / tiles;
  }

  void pack_rows(i64 m0, i64 height, int thread, int num_threads) {
    const i64 first = height * thread / num_threads, last = height * (thread + 1) / num_threads;
    if (g.R > 0)
      for (i64 i = first; i < last; ++i)
        pack_row<T, kPairs>(at<T>(g.s, m0 + i, 0), g.s.col_stride, g.R, rank_words,
                            rank_rows + i * rank_pitch);
    if (g.turned) return;
    if (g.drop_a.threshold > 0) return pack_kept_rows(m0, first, last);
    if (g.a.row_stride == 1 && g.a.col_stride != 1)
      return pack_rows_transposed<T, kPairs>(g.a, m0 + first, last - first, g.K, words, rows + first * pitch,
                                             pitch);
    for (i64 i = max(first, unpacked(height)); i < last; ++i)
      pack_row<T, kPairs>(at<T>(g.a, m0 + i, 0), g.a.col_stride, g.K, words, rows + i * pitch);
  }

  void pack_kept_rows(i64 m0, i64 first, i64 last) {
    u32* bits = static_cast<u32*>(scratch(Slot::keep, static_cast<std::size_t>(keep_words(g.K)) * 4));
    T* kept = static_cast<T*>(scratch(Slot::row, static_cast<std::size_t>(g.K + 2 * kLanes) * sizeof(T)));
    for (i64 i = first; i < last; ++i) {
      keep_row(g.drop_a, m0 + i, 0, g.K, bits);
      drop_row(at<T>(g.a, m0 + i, 0), g.a.col_stride, g.K, bits, kept);
      pack_row<T, kPairs>(kept, 1, g.K, words, rows + i * pitch);
    }
  }

  // Columns col0..col0+cols against row tiles first..last of the chunk.
  void run_job(i64 m0, i64 tiles, i64 col0, i64 cols, i64 first, i64 last) {
    const i64 strips = ceil_div(cols, kStrip), height = height_of(m0);
    const i64 row0 = tile_row(first, tiles, height), job_rows = tile_row(last, tiles, height) - row0;
    const i64 kept_tiles = g.turned     ? strips * (kTurnedRows / Engine::kRows + 1)
                           : blocks > 1 ? (last - first) * strips
                                        : 1;
    float* sums =
        static_cast<float*>(scratch(Slot::accumulators, static_cast<std::size_t>(kept_tiles * kTile) * 4));
    u32* panels = g.packed
                      ? nullptr
                      : static_cast<u32*>(scratch(
                            Slot::panels, static_cast<std::size_t>(strips * block_words * kStrip) * 4 + 64));
    const u32* rank_panels = g.R > 0 ? pack_rank_panels(col0, cols) : nullptr;
    for (i64 block = 0; block < blocks; ++block) {
      const i64 w0 = block * block_words, w = max(0, min(block_words, words - w0));
      if (g.packed == nullptr)
        pack_block(col0, cols, w0, w, panels);
      else
        fetch_panels(col0, cols, w0, w);
      for (i64 t = first; t < last; ++t) {
        const i64 row = tile_row(t, tiles, height), count = tile_row(t + 1, tiles, height) - row;
        const Segment rows_here = row_segment(m0, row, count, w0, w);
        for (i64 strip = 0; strip < strips; ++strip) {
          const i64 c0 = strip * kStrip, width = min(kStrip, cols - c0);
          const u32* strip_panels =
              g.packed ? g.packed + ((col0 + c0) / kPanel * words + w0) * kPanel : panels + c0 * block_words;
          const i64 panel_pitch = (g.packed ? words : block_words) * kPanel;
          const u32* strip_rank_panels = rank_panels + c0 * rank_words;
          float* sum = g.turned ? sums + (strip * kTurnedRows + row - row0) * kStrip
                                : sums + (blocks > 1 ? (t - first) * strips + strip : 0) * kTile;
          multiply(rows_here, row, count, width, strip_panels, panel_pitch, strip_rank_panels, block, sum);
          if (block == blocks - 1 && !g.turned)
            finish(m0 + row, count, row, col0 + c0, width, strip_rank_panels, sum);
        }
      }
    }
    for (i64 strip = 0; g.turned && strip < strips; ++strip)
      write_output<T>(g, row0, job_rows, strip * kStrip, min(kStrip, cols - strip * kStrip),
                      sums + strip * kTurnedRows * kStrip, kStrip);
  }

  // Asks for ready-made panels. NOTE: a few panels side by side, because one stream alone does not fill the
  // memory's pipe: the hardware's prefetcher runs ahead in each of several pages.
  void fetch_panels(i64 col0, i64 cols, i64 w0, i64 w) {
    const u32* first = g.packed + (col0 / kPanel * words + w0) * kPanel;
    const i64 count = ceil_div(cols, kPanel);
    for (i64 word = 0; word < w * kPanel; word += 16)
      for (i64 panel = 0; panel < count; ++panel)
        _mm_prefetch(reinterpret_cast<const char*>(first + panel * words * kPanel + word), _MM_HINT_T1);
  }

  // One row tile times one strip, for one block; the last block takes the rank along unless a mask is in the
  // way.
  void multiply(Segment rows_here, i64 row, i64 count, i64 width, const u32* panels, i64 panel_pitch,
                const u32* rank_panels, i64 block, float* sum) {
    const bool rank_here = block == blocks - 1 && g.R > 0 && g.drop_rank.threshold == 0;
    for (i64 c = 0; c < width; c += kPanel) {
      rows_here.p = panels + c / kPanel * panel_pitch;
      const Segment rank{rank_rows + row * rank_pitch, rank_pitch, rank_panels + c * rank_words,
                         rank_here ? rank_words : 0, nullptr};
      Engine::tile(count, width - c, rows_here, rank, sum + c, kStrip, block > 0);
    }
  }

  i64 height_of(i64 m0) { return min(chunk, g.M - m0); }

  // Rows of a chunk that are read where they are: all tiles whose rows fill whole steps of the engine.
  i64 unpacked(i64 height) {
    if (!direct) return 0;
    return height % Engine::kRowPad == 0 ? height : height / Engine::kRows * Engine::kRows;
  }

  // The rows of one tile: where they are, or as pack_rows left them.
  Segment row_segment(i64 m0, i64 row, i64 count, i64 w0, i64 w) {
    if (direct && row + round_up(count, Engine::kRowPad) <= unpacked(height_of(m0))) {
      const i64 next = row + count;
      const bool follows = g.a.row_stride == g.K && blocks == 1 && next + count <= unpacked(height_of(m0));
      return {reinterpret_cast<const u32*>(at<T>(g.a, m0 + row, w0 * kElements)), g.a.row_stride / kElements,
              nullptr, w, follows ? reinterpret_cast<const u32*>(at<T>(g.a, m0 + next, 0)) : nullptr};
    }
    if (g.turned) return copied_rows(row, count, w0, w);
    return {rows + row * pitch + w0, pitch, nullptr, w, nullptr};
  }

  // One block of a tile's rows, as words whose rows do not share one set of the first-level cache.
  Segment copied_rows(i64 row, i64 count, i64 w0, i64 w) {
    const i64 copy_pitch = block_words + kRowPitchPad;
    u32* copy =
        static_cast<u32*>(scratch(Slot::row, static_cast<std::size_t>(Engine::kRows * copy_pitch) * 4));
    for (i64 i = 0; i < count; ++i)
      pack_row<T, kPairs>(at<T>(g.a, row + i, w0 * kElements), g.a.col_stride,
                          min(w * kElements, g.K - w0 * kElements), w, copy + i * copy_pitch);
    return {copy, copy_pitch, nullptr, w, nullptr};
  }

  const u32* pack_rank_panels(i64 col0, i64 cols) {
    u32* out = static_cast<u32*>(
        scratch(Slot::rank_panels, static_cast<std::size_t>(round_up(cols, kPanel) * rank_words) * 4 + 64));
    pack_panels<T, kPairs>(g.l, col0, cols, 0, g.R, rank_words, out, rank_words * kPanel);
    return out;
  }

  // The panels of one contraction block of b, elements that the mask drops as zeros.
  void pack_block(i64 col0, i64 cols, i64 w0, i64 w, u32* out) {
    const i64 k0 = w0 * kElements, k = max(0, min(w * kElements, g.K - k0)),
              panel_pitch = block_words * kPanel;
    if (g.drop_b.threshold == 0) return pack_panels<T, kPairs>(g.b, col0, cols, k0, k, w, out, panel_pitch);
    const i64 row_pitch = round_up(cols, kStrip) + 2 * kLanes;
    u32* bits = static_cast<u32*>(scratch(Slot::keep, static_cast<std::size_t>(keep_words(cols)) * 4));
    T* kept = static_cast<T*>(scratch(Slot::row, static_cast<std::size_t>(k * row_pitch) * sizeof(T)));
    for (i64 i = 0; i < k; ++i) {
      keep_row(g.drop_b, k0 + i, col0, cols, bits);
      drop_row(at<T>(g.b, k0 + i, col0), g.b.col_stride, cols, bits, kept + i * row_pitch);
    }
    pack_panels<T, kPairs>({kept, row_pitch, 1}, 0, cols, 0, k, w, out, panel_pitch);
  }

  // Adds a masked rank term to a tile of sums and writes it. `row` counts within the chunk, `m` overall.
  void finish(i64 m, i64 count, i64 row, i64 col0, i64 cols, const u32* rank_panels, float* sum) {
    if (g.R > 0 && g.drop_rank.threshold > 0) {
      alignas(64) float rank_sum[kTile];
      for (i64 c = 0; c < cols; c += kPanel)
        Engine::tile(
            count, cols - c,
            {rank_rows + row * rank_pitch, rank_pitch, rank_panels + c * rank_words, rank_words, nullptr}, {},
            rank_sum + c, kStrip, false);
      add_kept(g.drop_rank, m, count, col0, cols, rank_sum, sum, kStrip);
    }
    write_output<T>(g, m, count, col0, cols, sum, kStrip);
  }

  const Gemm g;
  i64 words, rank_words, pitch, rank_pitch, chunk, blocks, block_words, tile_rows;
  u32 *rows, *rank_rows;
  bool direct;
};

}  // namespace lora_fused::LORA_FUSED_ISA
