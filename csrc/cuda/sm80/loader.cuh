// The producer's side of a tile: which k blocks it reads, from where, and into which stage.
#pragma once

#include "arguments.h"
#include "copies.cuh"

namespace lora_fused::sm80 {

// What a ticket stands for.
struct Work {
  int tile_m, row0;  // the row of tiles and its first token
  int col0;          // first column of y; of an S tile: first stacked rank
  int member;        // -1: an S tile; kNone: no work is left
  int cols;          // columns of an S tile
  static constexpr int kShrink = -1, kNone = -2;
};

// S tiles have the first tickets, so that a block waits only for work that has been started.
template <class Tile>
LORA_FUSED_DEVICE Work work_of(const MatmulLaunch& args, int ticket) {
  const int shrink_tiles = args.tiles_m * args.chunks, tiles_n = args.member[args.members - 1].tiles_end;
  if (ticket < shrink_tiles) {
    const int tile_m = ticket / args.chunks, chunk = ticket - tile_m * args.chunks;
    const int begin = args.chunk_begin[chunk];
    return {tile_m, tile_m * Tile::BLOCK_M, begin, Work::kShrink, args.chunk_begin[chunk + 1] - begin};
  }
  const int tile = ticket - shrink_tiles;
  if (tile >= args.tiles_m * tiles_n) return {0, 0, 0, Work::kNone, 0};
  const int band_tiles = args.group_m * tiles_n, band = tile / band_tiles;
  const int band_begin = band * args.group_m, band_rows = min(args.group_m, args.tiles_m - band_begin);
  const int inside = tile - band * band_tiles, tile_n = inside / band_rows;
  int member = 0, before = 0;
  while (tile_n >= args.member[member].tiles_end) before = args.member[member++].tiles_end;
  const int tile_m = band_begin + inside - tile_n * band_rows;
  return {tile_m, tile_m * Tile::BLOCK_M, (tile_n - before) * Tile::BLOCK_N, member, 0};
}

LORA_FUSED_DEVICE int blocks_of(int length, int block) { return (length + block - 1) / block; }

// The member that owns a stacked rank, or the one before it if the rank is padding between two.
LORA_FUSED_DEVICE int member_of_rank(const MatmulLaunch& args, int rank) {
  int member = 0;
  while (member + 1 < args.members && rank >= args.member[member + 1].rank_begin) ++member;
  return member;
}

// One tile's k blocks: `main_blocks` of (x, w), or (x, shrink) for an S tile, and `tail_blocks` of (s,
// expand).
template <class Tile>
struct Loader {
  using T = typename Tile::Element;
  static constexpr int kSize = Tile::kSize, BLOCK_K = Tile::BLOCK_K, kThreads = Tile::kThreads;
  static constexpr int kRowChunks = Tile::kRowBytes / 16, kWideChunks = Tile::kWideBytes / 16;
  using PartX = Part<Tile::BLOCK_M, kRowChunks, kThreads>;
  using PartW = Part<Tile::BLOCK_N, kRowChunks, kThreads>;      // k_major
  using PartWide = Part<Tile::BLOCK_K, kWideChunks, kThreads>;  // mn_major

  const MatmulLaunch& args;
  const std::uint32_t shared;
  Work work;
  int block, main_blocks, tail_blocks, tail_begin;
  int slot = 0;
  const char *x, *w;  // this thread's first chunks of the next main block

  LORA_FUSED_DEVICE Loader(const MatmulLaunch& arguments, std::uint32_t base)
      : args(arguments), shared(base) {}

  LORA_FUSED_DEVICE bool masks_output() const { return args.mask_output && args.threshold > 0; }
  LORA_FUSED_DEVICE bool waits() const { return args.chunks > 0 && tail_blocks > 0; }

  // Start on a tile: addresses, and the order of its blocks. Where y is masked, the rank's blocks come first:
  // the accumulators hold s expandᵀ alone then and can be masked.
  LORA_FUSED_DEVICE void begin(const Work& next) {
    work = next;
    block = 0;
    main_blocks = work.member == Work::kNone ? 0 : blocks_of(args.D, BLOCK_K);
    tail_blocks = work.member < 0 ? 0 : blocks_of(args.member[work.member].rank, BLOCK_K);
    tail_begin = masks_output() ? 0 : main_blocks;
    if constexpr (!Tile::kByElements) {
      x = chunk_of<PartX>(args.x, args.x.row_stride, work.row0, 0);
      if (work.member >= 0) {
        const Matrix& matrix = args.member[work.member].w;
        w = Tile::kTransposed ? chunk_of<PartWide>(matrix, matrix.col_stride, 0, work.col0)
                              : chunk_of<PartW>(matrix, matrix.row_stride, work.col0, 0);
      }
    }
  }

  LORA_FUSED_DEVICE bool at_tail() const { return block >= tail_begin && block < tail_begin + tail_blocks; }

  // Copy the next block, if there is one, into the next stage. Always one commit, so that waits can count.
  template <bool kShrink>
  LORA_FUSED_DEVICE void issue() {
    if (block < main_blocks + tail_blocks) {
      const std::uint32_t stage = shared + slot * Tile::kStageBytes;
      if (!kShrink && at_tail())
        issue_tail(stage, (block - tail_begin) * BLOCK_K);
      else
        issue_main<kShrink>(stage, (block < tail_begin ? block : block - tail_blocks) * BLOCK_K);
      ++block;
      slot = slot + 1 == Tile::kStages ? 0 : slot + 1;
    }
    ptx::cp_async_commit();
  }

 private:
  // This thread's chunk of a tile that begins at (row, col) of a matrix with rows `stride` apart.
  template <class Part>
  LORA_FUSED_DEVICE const char* chunk_of(const Matrix& matrix, i64 stride, int row, int col) const {
    const i64 element =
        (static_cast<i64>(row) + Part::row()) * stride + col + Part::chunk() * Tile::kPerChunk;
    return static_cast<const char*>(matrix.data) + element * kSize;
  }

  static LORA_FUSED_DEVICE std::uint32_t row_place(int row, int chunk) {
    return k_major_offset<Tile::kRowBytes>(row, chunk);
  }

  template <bool kShrink>
  LORA_FUSED_DEVICE void issue_main(std::uint32_t stage, int k0) {
    if constexpr (Tile::kByElements) {
      copy_by_elements<Tile::BLOCK_M, false>(stage, args.x, work.row0, args.M, k0, args.D);
    } else {
      PartX::copy(x, args.x.row_stride * kSize, args.M - work.row0, (args.D - k0) * kSize, Tile::BLOCK_M,
                  [&](int row, int chunk) { return stage + row_place(row, chunk); });
      x += Tile::kRowBytes;
    }
    if constexpr (kShrink)
      issue_shrink(stage + Tile::kBytesX, k0);
    else
      issue_weight(stage + Tile::kBytesX, k0);
  }

  LORA_FUSED_DEVICE void issue_weight(std::uint32_t to, int k0) {
    const Member& member = args.member[work.member];
    if constexpr (Tile::kByElements) {
      copy_by_elements<Tile::BLOCK_N, true>(to, member.w, work.col0, member.N, k0, args.D);
    } else if constexpr (Tile::kTransposed) {
      const i64 stride = member.w.col_stride * kSize;
      PartWide::copy(w, stride, args.D - k0, (member.N - work.col0) * kSize, BLOCK_K, [&](int k, int chunk) {
        return to + mn_major_offset<Tile::kWideBytes, kSize>(k, chunk);
      });
      w += BLOCK_K * stride;
    } else {
      PartW::copy(w, member.w.row_stride * kSize, member.N - work.col0, (args.D - k0) * kSize, Tile::BLOCK_N,
                  [&](int row, int chunk) { return to + row_place(row, chunk); });
      w += Tile::kRowBytes;
    }
  }

  // Rows col0, ... of the stacked shrink adapters.
  LORA_FUSED_DEVICE void issue_shrink(std::uint32_t to, int k0) {
    const int wanted = blocks_of(work.cols, 16) * 16;
    if (Tile::kByElements || args.shrink_by_elements) {
      copy_elements<T, kThreads>(
          wanted * BLOCK_K, [&](int e) { return to + element_offset<Tile>(e / BLOCK_K, e % BLOCK_K); },
          [&](int e) { return shrink_row(e / BLOCK_K) >= 0 && k0 + e % BLOCK_K < args.D; },
          [&](int e) {
            const int row = shrink_row(e / BLOCK_K), owner = member_of_rank(args, work.col0 + e / BLOCK_K);
            return element_of(args.member[owner].shrink, row, k0 + e % BLOCK_K);
          });
    } else if constexpr (Tile::kTransposed) {
      const Matrix& matrix = args.member[0].shrink;  // NOTE: stacked members are read by elements
      if (PartWide::chunk() * 16 < wanted * kSize)
        PartWide::copy(
            chunk_of<PartWide>(matrix, matrix.col_stride, k0, work.col0), matrix.col_stride * kSize,
            args.D - k0, work.cols * kSize, BLOCK_K,
            [&](int k, int chunk) { return to + mn_major_offset<Tile::kWideBytes, kSize>(k, chunk); });
    } else {
      const int k = k0 + PartW::chunk() * Tile::kPerChunk, bytes = clamp((args.D - k) * kSize, 0, 16);
      for (int r = PartW::row(); r < wanted; r += PartW::kStep) {
        const int row = shrink_row(r), owner = member_of_rank(args, work.col0 + r);
        ptx::cp_async_16(to + row_place(r, PartW::chunk()),
                         element_of(args.member[owner].shrink, max(row, 0), k), row < 0 ? 0 : bytes);
      }
    }
  }

  // The row of its member's adapter that row r of this S tile is, or -1 for padding.
  LORA_FUSED_DEVICE int shrink_row(int r) const {
    const Member& member = args.member[member_of_rank(args, work.col0 + r)];
    const int row = work.col0 + r - member.rank_begin;
    return r < work.cols && row < member.rank ? row : -1;
  }

  LORA_FUSED_DEVICE const T* element_of(const Matrix& matrix, i64 row, i64 col) const {
    return static_cast<const T*>(matrix.data) + row * matrix.row_stride + col * matrix.col_stride;
  }

  LORA_FUSED_DEVICE void issue_tail(std::uint32_t stage, int r0) {
    const Member& member = args.member[work.member];
    const Matrix s = {args.s.data, args.s.row_stride, 1};
    const int row_bytes = (member.rank - r0) * kSize;
    PartX::copy(chunk_of<PartX>(s, s.row_stride, work.row0, member.rank_begin + r0), s.row_stride * kSize,
                args.M - work.row0, row_bytes, Tile::BLOCK_M,
                [&](int row, int chunk) { return stage + row_place(row, chunk); });
    const std::uint32_t to = stage + Tile::kBytesX;
    const Matrix& expand = member.expand;
    if (Tile::kByElements || member.expand_by_elements) {
      copy_by_elements<Tile::BLOCK_N, true>(to, expand, work.col0, member.N, r0, member.rank);
    } else if constexpr (Tile::kTransposed) {
      PartWide::copy(chunk_of<PartWide>(expand, expand.col_stride, r0, work.col0), expand.col_stride * kSize,
                     member.rank - r0, (member.N - work.col0) * kSize, BLOCK_K, [&](int k, int chunk) {
                       return to + mn_major_offset<Tile::kWideBytes, kSize>(k, chunk);
                     });
    } else {
      PartW::copy(chunk_of<PartW>(expand, expand.row_stride, work.col0, r0), expand.row_stride * kSize,
                  member.N - work.col0, row_bytes, Tile::BLOCK_N,
                  [&](int row, int chunk) { return to + row_place(row, chunk); });
    }
  }

  // A tile [kRows, BLOCK_K] of any matrix, from (row0, k0); neighbouring threads read neighbouring elements.
  template <int kRows, bool kSecond>
  LORA_FUSED_DEVICE void copy_by_elements(std::uint32_t to, const Matrix& matrix, int row0, int rows, int k0,
                                          int ks) {
    const bool along_k = matrix.col_stride <= matrix.row_stride;
    auto row_of = [&](int e) { return along_k ? e / BLOCK_K : e % kRows; };
    auto k_of = [&](int e) { return along_k ? e % BLOCK_K : e / kRows; };
    copy_elements<T, kThreads>(
        kRows * BLOCK_K,
        [&](int e) {
          if constexpr (kSecond) return to + element_offset<Tile>(row_of(e), k_of(e));
          const int k = k_of(e);
          return to + row_place(row_of(e), k / Tile::kPerChunk) + k % Tile::kPerChunk * kSize;
        },
        [&](int e) { return row0 + row_of(e) < rows && k0 + k_of(e) < ks; },
        [&](int e) { return element_of(matrix, row0 + row_of(e), k0 + k_of(e)); });
  }
};

}  // namespace lora_fused::sm80
