// y = x wᵀ + s expandᵀ + bias  with  s = scale · (mask ⊙ x) shrinkᵀ, in one launch: "S first". See
// arguments.h for the shapes and for how dx is the same problem.
//
//   S tiles     [BLOCK_M, <= 128 stacked ranks]: the K loop over x and shrink; s goes to global memory and
//   raises
//               the flag of its row of tiles.
//   main tiles  [BLOCK_M, BLOCK_N]: the K loop over x and w, extended by the rank's blocks of (s, expand)
//   into the
//               same accumulators, once the flag is up.
//
// Blocks are persistent and take tiles from a ticket counter: bands of group_m rows of tiles, column by
// column in a band, after all S tiles. chunks = 0: s is given and there are no flags (split). Pipeline:
// cp.async into kStages stages, ldmatrix into two sets of fragments, mma.sync with fp32 accumulators. The
// first blocks of the next tile are under way while this one is stored.
// Not handled: s whose rows are not multiples of 16 bytes; IEEE fp32 (fp32 is multiplied as TF32).
#pragma once

#include "../flags.cuh"
#include "epilogue.cuh"
#include "loader.cuh"
#include "masks.cuh"

namespace lora_fused::sm80 {

template <class Tile>
struct Matmul {
  using T = typename Tile::Element;
  static constexpr int kFragsM = Tile::kFragsM, kFragsN = Tile::kFragsN, kSteps = Tile::kSteps;
  static constexpr int kPairsN = kFragsN / 2, kStages = Tile::kStages;

  const MatmulArgs& args;
  const std::uint32_t shared;
  const int lane, warp;
  Loader<Tile> loader;
  int slot = 0;  // the stage that is read next

  LORA_FUSED_DEVICE Matmul(const MatmulArgs& arguments, std::uint32_t base)
      : args(arguments),
        shared(base),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        loader(arguments, base) {}

  // Where a warp's part of a main tile begins.
  static LORA_FUSED_DEVICE int warp_row(int warp) { return warp / Tile::kNumWarpsN * Tile::WARP_M; }
  static LORA_FUSED_DEVICE int warp_col(int warp) { return warp % Tile::kNumWarpsN * Tile::WARP_N; }

  // ---- tickets ------------------------------------------------------------------------------------------

  LORA_FUSED_DEVICE void take_work(const Work& last, Work& work) {
    if (threadIdx.x != 0) return;
    take_place(args, last, work);
    find_work<Tile>(args, work);
  }

  // The last block to leave puts the workspace back to zero for the next launch.
  LORA_FUSED_DEVICE void leave() {
    __shared__ bool last;
    if (threadIdx.x == 0) last = ptx::atom_add_acq_rel(args.words + kLeft, 1) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    const int words = kFlags + (args.chunks > 0 ? args.tiles_m : 0);
    for (int i = threadIdx.x; i < words; i += Tile::kThreads) ptx::st_relaxed(args.words + i, 0);
  }

  // ---- the pipeline -------------------------------------------------------------------------------------

  // Before the first block of the rank is copied, s must be there. A block barrier follows before any thread
  // but this one relies on it.
  LORA_FUSED_DEVICE void wait_for_s() {
    if (loader.needs_s() && threadIdx.x == 0)
      wait_flag(args.words + kFlags + loader.work->tile_m, args.chunks, args.error);
  }

  // Fill all stages but one with the first blocks of a tile.
  LORA_FUSED_DEVICE void begin(const Work* work) {
    if (work->member == Work::kNone) return;
    loader.begin(work);
    int to = slot;
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) {
      if (loader.needs_s()) {
        wait_for_s();
        __syncthreads();
      }
      if (work->member < 0)
        loader.template issue<true>(to);
      else
        loader.template issue<false>(to);
      to = to + 1 == kStages ? 0 : to + 1;
    }
  }

  // The next stage has landed, and nobody reads the one before it any more.
  LORA_FUSED_DEVICE void next_stage_ready() {
    wait_for_s();
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
  }

  template <bool kShrink>
  LORA_FUSED_DEVICE void refill() {
    loader.template issue<kShrink>(slot == 0 ? kStages - 1 : slot - 1);
  }

  LORA_FUSED_DEVICE std::uint32_t stage() const { return shared + slot * Tile::kStageBytes; }
  LORA_FUSED_DEVICE void advance() { slot = slot + 1 == kStages ? 0 : slot + 1; }

  // How many blocks are still to be multiplied before block `end` of the tile.
  LORA_FUSED_DEVICE int left(int end) const { return end - (loader.block - (kStages - 1)); }

  // ---- main tiles ---------------------------------------------------------------------------------------

  struct Fragments {
    std::uint32_t a[kFragsM][4], b[kPairsN][4];
  };

  LORA_FUSED_DEVICE void load(Fragments& f, int step) const {
    const std::uint32_t x = stage(), w = x + Tile::kBytesX;
#pragma unroll
    for (int i = 0; i < kFragsM; ++i) load_left<Tile>(f.a[i], x, warp_row(warp) + i * 16, step, lane);
#pragma unroll
    for (int j = 0; j < kPairsN; ++j) load_right<Tile>(f.b[j], w, warp_col(warp) + j * 16, step, lane);
  }

  static LORA_FUSED_DEVICE void multiply(float (&c)[kFragsM][kFragsN][4], Fragments& f) {
#pragma unroll
    for (int i = 0; i < kFragsM; ++i) round_fragment<T>(f.a[i]);
#pragma unroll
    for (int j = 0; j < kPairsN; ++j) round_fragment<T>(f.b[j]);
#pragma unroll
    for (int i = 0; i < kFragsM; ++i)
#pragma unroll
      for (int j = 0; j < kFragsN; ++j)
        Numeric<T>::mma(c[i][j], f.a[i], f.b[j / 2][j % 2 * 2], f.b[j / 2][j % 2 * 2 + 1]);
  }

  // c += x wᵀ, until block `end`. The fragments of a step are read while the step before is multiplied.
  LORA_FUSED_DEVICE void main_loop(float (&c)[kFragsM][kFragsN][4], int end) {
    Fragments f[2];
    next_stage_ready();
    load(f[0], 0);
    bool more = true;
#pragma unroll 1
    while (more) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step + 1 < kSteps) {
          load(f[(step + 1) % 2], step + 1);
        } else {
          advance();
          more = left(end) > 0;
          if (more) {
            next_stage_ready();
            load(f[0], 0);
          }
        }
        if (step == 0) refill<false>();
        multiply(c, f[step % 2]);
      }
    }
  }

  // c += s expandᵀ: only the steps that the rank has.
  LORA_FUSED_DEVICE void rank_loop(float (&c)[kFragsM][kFragsN][4]) {
    Fragments f;
#pragma unroll 1
    for (int rank = loader.work->rank; rank > 0; rank -= Tile::BLOCK_K) {
      next_stage_ready();
      refill<false>();
      const int steps = min(kSteps, blocks_of(rank, Tile::kStepK));
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        load(f, step);
        multiply(c, f);
      }
      advance();
    }
  }

  LORA_FUSED_DEVICE Mask mask_of(const Member& member, int row_length) const {
    const u64 seed = member.seed_pointer ? *member.seed_pointer : member.seed;
    return {seed, philox::counters_per_row(row_length), args.threshold};
  }

  LORA_FUSED_DEVICE void mask_output(float (&c)[kFragsM][kFragsN][4], const Work& work) const {
    const int thread = ptx::opaque(threadIdx.x), w = thread / 32;
    mask_accumulators(c, mask_of(args.member[work.member], work.cols), work.row0 + warp_row(w),
                      work.col0 + warp_col(w), thread % 32);
  }

  LORA_FUSED_DEVICE void main_tile(const Work& work, const Work& next) {
    float c[kFragsM][kFragsN][4] = {};
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
      const bool rank_first = work.tail_begin == 0;
      if ((phase == 0) != rank_first) {
        main_loop(c, work.main_blocks + (rank_first ? work.tail_blocks : 0));
        continue;
      }
      rank_loop(c);
      if (rank_first) mask_output(c, work);
    }
    begin(&next);
    const int thread = ptx::opaque(threadIdx.x), w = thread / 32;
    const Member& member = args.member[work.member];
    const Store<T, Tile::kByElements> store = {
        member.y, member.bias, args.M, work.cols, member.y_by_elements != 0, args.accumulate != 0};
    store_tile(store, c, work.row0 + warp_row(w), work.col0 + warp_col(w), thread % 32);
  }

  // ---- S tiles ------------------------------------------------------------------------------------------

  LORA_FUSED_DEVICE void shrink_tile(const Work& work, const Work& next) {
    constexpr int kShrinkFragsM = Tile::kShrinkFragsM, kShrinkPairsN = Tile::kShrinkPairsN;
    const int thread = ptx::opaque(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int row = warp % Tile::kShrinkWarpsM * kShrinkFragsM * 16, pair0 = warp / Tile::kShrinkWarpsM;
    const bool masked = args.threshold > 0 && !args.mask_output;
    const Member& first = args.member[member_of_rank(args, work.col0)];
    Mask mask = {};
    if (masked) mask = mask_of(first, args.D);
    float c[kShrinkFragsM][2 * kShrinkPairsN][4] = {};
#pragma unroll 1
    for (int k0 = 0; k0 < args.D; k0 += Tile::BLOCK_K) {
      next_stage_ready();
      refill<true>();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        std::uint32_t a[kShrinkFragsM][4], b[4];
#pragma unroll
        for (int i = 0; i < kShrinkFragsM; ++i) {
          load_left<Tile>(a[i], stage(), row + i * 16, step, lane);
          if (masked)
            mask_left<Tile::kSize>(a[i], mask, work.row0 + row + i * 16, k0 + step * Tile::kStepK, lane);
          round_fragment<T>(a[i]);
        }
#pragma unroll
        for (int j = 0; j < kShrinkPairsN; ++j) {
          const int col = (j * Tile::kShrinkWarpsN + pair0) * 16;
          if (col >= work.cols) break;
          load_right<Tile>(b, stage() + Tile::kBytesX, col, step, lane);
          round_fragment<T>(b);
#pragma unroll
          for (int i = 0; i < kShrinkFragsM; ++i) {
            Numeric<T>::mma(c[i][2 * j], a[i], b[0], b[1]);
            Numeric<T>::mma(c[i][2 * j + 1], a[i], b[2], b[3]);
          }
        }
      }
      advance();
    }
    store_shrunk<T, kShrinkFragsM, kShrinkPairsN>(args.s, c, first.scale, work.row0 + row, args.M,
                                                  work.col0 + pair0 * 16, work.col0 + work.cols,
                                                  Tile::kShrinkWarpsN * 16, lane);
    __syncthreads();
    if (threadIdx.x == 0) ptx::red_add_release(args.words + kFlags + work.tile_m, 1);
    begin(&next);
  }

  // NOTE: three slots: this tile's work is read until it is stored, while a faster thread 0, one tile ahead,
  // takes the ticket after the next.
  LORA_FUSED_DEVICE void run() {
    __shared__ Work works[3];
    ptx::griddepcontrol_wait();
    if (threadIdx.x == 0) works[2].place = works[2].place_end = 0;  // no ticket yet
    take_work(works[2], works[0]);
    __syncthreads();
    begin(&works[0]);
    int now = 0;
    while (works[now].member != Work::kNone) {
      const int next = now == 2 ? 0 : now + 1;
      take_work(works[now], works[next]);
      if (works[now].member < 0)
        shrink_tile(works[now], works[next]);
      else
        main_tile(works[now], works[next]);
      now = next;
    }
    ptx::cp_async_wait_all();
    leave();
  }
};

template <class Tile>
LORA_FUSED_DEVICE void matmul(const MatmulArgs& args) {
  extern __shared__ __align__(128) std::uint8_t stages[];
  Matmul<Tile>(args, ptx::shared_address(stages)).run();
}

}  // namespace lora_fused::sm80
