// The producer's side of a tile: which k blocks it reads, from where, and into which stage.
#pragma once

#include <type_traits>

#include "arguments.h"
#include "copies.cuh"

namespace lora_fused::sm80 {

// What a ticket stands for. NOTE: it lies in shared memory, because a main tile has no registers to spare.
struct Work {
  int member;        // kShrink: an S tile; kNone: no work is left
  int tile_m, row0;  // the row of tiles and its first token
  int col0;          // first column of y; of an S tile: first stacked rank
  int cols;          // N; of an S tile: its ranks
  int rank;          // of the member; of an S tile: 0
  // Its k blocks: main_blocks of (x, w) or (x, shrink), and from tail_begin on tail_blocks of (s, expand).
  // Where y is masked, the rank comes first: the accumulators hold s expandᵀ alone then and can be masked.
  int main_blocks, tail_blocks, tail_begin;
  int place, place_end;  // in the list of tiles: this one's, and where its ticket ends
  static constexpr int kShrink = -1, kNone = -2;
};

LORA_FUSED_DEVICE int blocks_of(int length, int block) { return (length + block - 1) / block; }

// The next place in the list of tiles: the next of the last ticket's, or the first of a new one's. S tiles
// have the first tickets, so that a block waits only for work that has been started, and shrink_group of them
// each: an S tile is a part of a tile of y, and a few on one block delay the last round less than one on each
// of many.
LORA_FUSED_DEVICE void take_place(const MatmulArgs& args, const Work& last, Work& work) {
  work.place = last.place + 1, work.place_end = last.place_end;
  if (work.place < work.place_end) return;
  const int group = args.shrink_group, shrink_tiles = args.tiles_m * args.chunks;
  const int ticket = ptx::atom_add_acq_rel(args.words + kTicket, 1);
  const int later = ticket - blocks_of(shrink_tiles, group);  // tickets of tiles of y before this one
  work.place = later < 0 ? ticket * group : shrink_tiles + later;
  work.place_end = later < 0 ? min(work.place + group, shrink_tiles) : work.place + 1;
}

// What is to be done at work.place.
template <class Tile>
LORA_FUSED_DEVICE void find_work(const MatmulArgs& args, Work& work) {
  const int shrink_tiles = args.tiles_m * args.chunks, tiles_n = args.member[args.members - 1].tiles_end;
  const int tile = work.place - shrink_tiles;
  work.member = tile < 0 ? Work::kShrink : tile < args.tiles_m * tiles_n ? 0 : Work::kNone;
  work.main_blocks = blocks_of(args.D, Tile::BLOCK_K);
  work.rank = work.tail_blocks = work.tile_m = work.col0 = work.cols = 0;
  if (tile < 0) {
    const int chunk = work.place % args.chunks;
    work.tile_m = work.place / args.chunks;
    work.col0 = args.chunk_begin[chunk];
    work.cols = args.chunk_begin[chunk + 1] - work.col0;
  } else if (work.member == 0) {
    const int band_tiles = args.group_m * tiles_n, band_begin = tile / band_tiles * args.group_m;
    const int band_rows = min(args.group_m, args.tiles_m - band_begin), inside = tile % band_tiles;
    int tile_n = inside / band_rows, before = 0;
    work.tile_m = band_begin + inside % band_rows;
    while (tile_n >= args.member[work.member].tiles_end) before = args.member[work.member++].tiles_end;
    work.col0 = (tile_n - before) * Tile::BLOCK_N;
    work.cols = args.member[work.member].N;
    work.rank = args.member[work.member].rank;
    work.tail_blocks = blocks_of(work.rank, Tile::BLOCK_K);
  }
  work.row0 = work.tile_m * Tile::BLOCK_M;
  work.tail_begin = work.tail_blocks > 0 && args.mask_output && args.threshold > 0 ? 0 : work.main_blocks;
}

// The member that owns a stacked rank, or the one before it if the rank is padding between two.
LORA_FUSED_DEVICE int member_of_rank(const MatmulArgs& args, int rank) {
  int member = 0;
  while (member + 1 < args.members && rank >= args.member[member + 1].rank_begin) ++member;
  return member;
}

// Copies the k blocks of a tile.
template <class Tile>
struct Loader {
  using T = typename Tile::Element;
  static constexpr int kSize = Tile::kSize, BLOCK_K = Tile::BLOCK_K, kThreads = Tile::kThreads;
  using PartX = Part<Tile::BLOCK_M, Tile::kRowBytes, kThreads, kSize, false>;
  using PartW = std::conditional_t<Tile::kTransposed, Part<BLOCK_K, Tile::kWideBytes, kThreads, kSize, true>,
                                   Part<Tile::BLOCK_N, Tile::kRowBytes, kThreads, kSize, false>>;

  const MatmulArgs& args;
  const std::uint32_t shared;
  const Work* work;
  int block;      // the one that is copied next
  int plain_end;  // blocks before this one, and not before `block`, are main blocks: nothing else to look at
  int k_left;     // of the contraction, from the next main block on
  const char *x, *w;  // this thread's first chunks of the next main block

  LORA_FUSED_DEVICE Loader(const MatmulArgs& arguments, std::uint32_t base) : args(arguments), shared(base) {}

  // s is computed by this launch, and the next block is the first that needs it.
  LORA_FUSED_DEVICE bool needs_s() const {
    return block >= plain_end && args.chunks > 0 && work->tail_blocks > 0 && block == work->tail_begin;
  }

  LORA_FUSED_DEVICE void begin(const Work* next) {
    work = next;
    block = 0;
    plain_end = work->tail_begin;
    k_left = args.D;
    if constexpr (!Tile::kByElements) {
      const int thread = ptx::opaque(threadIdx.x);
      x = chunk_of(PartX(thread), args.x.data, args.x.row_stride, work->row0, 0);
      if (work->member >= 0) w = second_chunk(PartW(thread), args.member[work->member].w, work->col0, 0);
    }
  }

  // Copy the next block, if there is one, into stage `slot`. Always one commit, so that waits can count.
  template <bool kShrink>
  LORA_FUSED_DEVICE void issue(int slot) {
    const std::uint32_t stage = shared + slot * Tile::kStageBytes;
    if (block < plain_end)
      issue_main<kShrink>(stage);
    else if (!kShrink && block < work->tail_begin + work->tail_blocks)
      issue_tail(stage, (block - work->tail_begin) * BLOCK_K);
    ++block;
    if (block >= plain_end && block == work->tail_begin + work->tail_blocks)
      plain_end = work->main_blocks + work->tail_blocks;
    ptx::cp_async_commit();
  }

 private:
  // This thread's chunk of a tile that begins at (row, col) of a matrix with rows `stride` apart.
  template <class Part>
  static LORA_FUSED_DEVICE const char* chunk_of(const Part& part, const void* data, i64 stride, int row,
                                                int col) {
    const i64 element = (static_cast<i64>(row) + part.row) * stride + col + part.chunk * Tile::kPerChunk;
    return static_cast<const char*>(data) + element * kSize;
  }

  // The same for a second operand, of which (row, k) is wanted.
  static LORA_FUSED_DEVICE const char* second_chunk(const PartW& part, const Matrix& matrix, int row, int k) {
    return Tile::kTransposed ? chunk_of(part, matrix.data, matrix.col_stride, k, row)
                             : chunk_of(part, matrix.data, matrix.row_stride, row, k);
  }

  // Copy a second operand's tile; rows and ks are how many there are from here on.
  static LORA_FUSED_DEVICE void copy_second(const PartW& part, std::uint32_t to, const char* from,
                                            const Matrix& matrix, int rows, int ks) {
    if constexpr (Tile::kTransposed)
      part.copy(to, from, matrix.col_stride * kSize, ks, rows * kSize);
    else
      part.copy(to, from, matrix.row_stride * kSize, rows, ks * kSize);
  }

  template <bool kShrink>
  LORA_FUSED_DEVICE void issue_main(std::uint32_t stage) {
    if constexpr (Tile::kByElements) {
      copy_by_elements<Tile::BLOCK_M, false>(stage, args.x, work->row0, args.M, args.D - k_left, args.D);
    } else {
      PartX(threadIdx.x).copy(stage, x, args.x.row_stride * kSize, args.M - work->row0, k_left * kSize);
      x += Tile::kRowBytes;
    }
    if constexpr (kShrink)
      issue_shrink(stage + Tile::kBytesX, args.D - k_left);
    else
      issue_weight(stage + Tile::kBytesX);
    k_left -= BLOCK_K;
  }

  LORA_FUSED_DEVICE void issue_weight(std::uint32_t to) {
    const Member& member = args.member[work->member];
    if constexpr (Tile::kByElements) {
      copy_by_elements<Tile::BLOCK_N, true>(to, member.w, work->col0, work->cols, args.D - k_left, args.D);
    } else {
      copy_second(PartW(threadIdx.x), to, w, member.w, work->cols - work->col0, k_left);
      w += Tile::kTransposed ? BLOCK_K * member.w.col_stride * kSize : Tile::kRowBytes;
    }
  }

  // Rows col0, ... of the stacked shrink adapters.
  LORA_FUSED_DEVICE void issue_shrink(std::uint32_t to, int k0) {
    const int wanted = blocks_of(work->cols, 16) * 16;
    if (Tile::kByElements || args.shrink_by_elements) {
      copy_elements<T, kThreads>(
          wanted * BLOCK_K, [&](int e) { return to + element_offset<Tile>(e / BLOCK_K, e % BLOCK_K); },
          [&](int e) { return shrink_row(e / BLOCK_K) >= 0 && k0 + e % BLOCK_K < args.D; },
          [&](int e) {
            const int row = shrink_row(e / BLOCK_K), owner = member_of_rank(args, work->col0 + e / BLOCK_K);
            return element_of(args.member[owner].shrink, row, k0 + e % BLOCK_K);
          });
    } else if constexpr (Tile::kTransposed) {
      const Matrix& matrix = args.member[0].shrink;  // NOTE: stacked members are read by elements
      const PartW part(ptx::opaque(threadIdx.x));
      if (part.chunk * 16 < wanted * kSize)
        copy_second(part, to, second_chunk(part, matrix, work->col0, k0), matrix, work->cols, args.D - k0);
    } else {
      const PartW part(ptx::opaque(threadIdx.x));
      const int k = k0 + part.chunk * Tile::kPerChunk, bytes = clamp((args.D - k) * kSize, 0, 16);
      for (int r = part.row; r < wanted; r += PartW::kStep) {
        const int row = shrink_row(r), owner = member_of_rank(args, work->col0 + r);
        ptx::cp_async_16(to + part.place(r, part.chunk),
                         element_of(args.member[owner].shrink, max(row, 0), k), row < 0 ? 0 : bytes);
      }
    }
  }

  // The row of its member's adapter that row r of this S tile is, or -1 for padding.
  LORA_FUSED_DEVICE int shrink_row(int r) const {
    const Member& member = args.member[member_of_rank(args, work->col0 + r)];
    const int row = work->col0 + r - member.rank_begin;
    return r < work->cols && row < member.rank ? row : -1;
  }

  LORA_FUSED_DEVICE const T* element_of(const Matrix& matrix, i64 row, i64 col) const {
    return static_cast<const T*>(matrix.data) + row * matrix.row_stride + col * matrix.col_stride;
  }

  LORA_FUSED_DEVICE void issue_tail(std::uint32_t stage, int r0) {
    const Member& member = args.member[work->member];
    const int thread = ptx::opaque(threadIdx.x), ranks = work->rank - r0;
    const PartX part(thread);
    part.copy(stage, chunk_of(part, args.s.data, args.s.row_stride, work->row0, member.rank_begin + r0),
              args.s.row_stride * kSize, args.M - work->row0, ranks * kSize);
    const std::uint32_t to = stage + Tile::kBytesX;
    if (Tile::kByElements || member.expand_by_elements) {
      copy_by_elements<Tile::BLOCK_N, true>(to, member.expand, work->col0, work->cols, r0, work->rank);
    } else {
      const PartW second(thread);
      copy_second(second, to, second_chunk(second, member.expand, work->col0, r0), member.expand,
                  work->cols - work->col0, ranks);
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
          return to + PartX::place(row_of(e), k / Tile::kPerChunk) + k % Tile::kPerChunk * kSize;
        },
        [&](int e) { return row0 + row_of(e) < rows && k0 + k_of(e) < ks; },
        [&](int e) { return element_of(matrix, row0 + row_of(e), k0 + k_of(e)); });
  }
};

}  // namespace lora_fused::sm80
