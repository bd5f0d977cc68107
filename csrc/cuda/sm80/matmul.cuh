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

  const MatmulLaunch& args;
  const std::uint32_t shared;
  const int lane, warp;
  Loader<Tile> loader;
  int slot = 0;  // the stage that is read next

  LORA_FUSED_DEVICE Matmul(const MatmulLaunch& arguments, std::uint32_t base)
      : args(arguments),
        shared(base),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        loader(arguments, base) {}

  // Where a warp's part of a main tile begins.
  static LORA_FUSED_DEVICE int warp_row(int warp) { return warp / Tile::kNumWarpsN * Tile::WARP_M; }
  static LORA_FUSED_DEVICE int warp_col(int warp) { return warp % Tile::kNumWarpsN * Tile::WARP_N; }

  // ---- tickets ------------------------------------------------------------------------------------------

  // NOTE: two slots, because a fast thread 0 takes a ticket while slow threads still read the last one.
  LORA_FUSED_DEVICE void take_ticket(std::uint32_t* ticket) {
    if (threadIdx.x == 0) *ticket = ptx::atom_add_acq_rel(args.workspace + kTicket, 1);
  }

  // The last block to leave puts the workspace back to zero for the next launch.
  LORA_FUSED_DEVICE void leave() {
    __shared__ bool last;
    if (threadIdx.x == 0) last = ptx::atom_add_acq_rel(args.workspace + kLeft, 1) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    const int words = kFlags + (args.chunks > 0 ? args.tiles_m : 0);
    for (int i = threadIdx.x; i < words; i += Tile::kThreads)
      if (i != kError) ptx::st_relaxed(args.workspace + i, 0);
  }

  // ---- the pipeline -------------------------------------------------------------------------------------

  // Before the first block of the rank is copied, s must be there. A block barrier follows before any thread
  // but this one relies on it.
  LORA_FUSED_DEVICE void wait_for_s() {
    if (loader.waits() && loader.block == loader.tail_begin && threadIdx.x == 0)
      wait_flag(args.workspace + kFlags + loader.work.tile_m, args.chunks, args.workspace + kError);
  }

  LORA_FUSED_DEVICE void begin(const Work& work) {
    if (work.member == Work::kNone) return;
    loader.begin(work);
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) {
      if (loader.waits() && loader.block == loader.tail_begin) {
        wait_for_s();
        __syncthreads();
      }
      if (work.member < 0)
        loader.template issue<true>();
      else
        loader.template issue<false>();
    }
  }

  // The next stage has landed, and nobody reads the one before it any more.
  LORA_FUSED_DEVICE void next_stage_ready() {
    wait_for_s();
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
  }

  LORA_FUSED_DEVICE std::uint32_t stage() const { return shared + slot * Tile::kStageBytes; }
  LORA_FUSED_DEVICE void advance() { slot = slot + 1 == kStages ? 0 : slot + 1; }

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

  // c += x wᵀ. The fragments of a step are read while the step before is multiplied.
  LORA_FUSED_DEVICE void main_loop(float (&c)[kFragsM][kFragsN][4]) {
    Fragments f[2];
    next_stage_ready();
    load(f[0], 0);
#pragma unroll 1
    for (int left = loader.main_blocks; left > 0; --left) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step + 1 < kSteps) {
          load(f[(step + 1) % 2], step + 1);
        } else {
          advance();
          if (left > 1) {
            next_stage_ready();
            load(f[0], 0);
          }
        }
        if (step == 0) loader.template issue<false>();
        multiply(c, f[step % 2]);
      }
    }
  }

  // c += s expandᵀ: only the steps that the rank has.
  LORA_FUSED_DEVICE void rank_loop(float (&c)[kFragsM][kFragsN][4], int rank) {
    Fragments f;
#pragma unroll 1
    for (; rank > 0; rank -= Tile::BLOCK_K) {
      next_stage_ready();
      loader.template issue<false>();
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
    const Member& member = args.member[work.member];
    const int thread = ptx::opaque(threadIdx.x), w = thread / 32;
    mask_accumulators(c, mask_of(member, member.N), work.row0 + warp_row(w), work.col0 + warp_col(w),
                      thread % 32);
  }

  LORA_FUSED_DEVICE Work main_tile(const Work work, const std::uint32_t* next_ticket) {
    const Member& member = args.member[work.member];
    float c[kFragsM][kFragsN][4] = {};
    const bool rank_first = loader.masks_output();
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
      if ((phase == 0) != rank_first) {
        main_loop(c);
        continue;
      }
      rank_loop(c, member.rank);
      if (rank_first) mask_output(c, work);
    }
    const Work next = work_of<Tile>(args, *next_ticket);
    begin(next);
    const int thread = ptx::opaque(threadIdx.x), w = thread / 32;
    const Store<T> store = {member.y, member.bias, args.M, member.N,
                            Tile::kByElements || member.y_by_elements};
    store_tile(store, c, work.row0 + warp_row(w), work.col0 + warp_col(w), thread % 32);
    return next;
  }

  // ---- S tiles ------------------------------------------------------------------------------------------

  LORA_FUSED_DEVICE Work shrink_tile(const Work work, const std::uint32_t* next_ticket) {
    constexpr int kShrinkFragsM = Tile::kShrinkFragsM, kShrinkPairsN = Tile::kShrinkPairsN;
    const int row = warp % Tile::kShrinkWarpsM * kShrinkFragsM * 16, pair0 = warp / Tile::kShrinkWarpsM;
    const bool masked = args.threshold > 0 && !args.mask_output;
    Mask mask = {};
    if (masked) mask = mask_of(args.member[member_of_rank(args, work.col0)], args.D);
    float c[kShrinkFragsM][2 * kShrinkPairsN][4] = {};
#pragma unroll 1
    for (int k0 = 0; k0 < args.D; k0 += Tile::BLOCK_K) {
      next_stage_ready();
      loader.template issue<true>();
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
    store_shrunk<T, kShrinkFragsM, kShrinkPairsN>(args.s, c, args.scale, work.row0 + row, args.M,
                                                  work.col0 + pair0 * 16, work.col0 + work.cols,
                                                  Tile::kShrinkWarpsN * 16, lane);
    __syncthreads();
    if (threadIdx.x == 0) ptx::red_add_release(args.workspace + kFlags + work.tile_m, 1);
    const Work next = work_of<Tile>(args, *next_ticket);
    begin(next);
    return next;
  }

  LORA_FUSED_DEVICE void run() {
    __shared__ std::uint32_t tickets[2];
    take_ticket(&tickets[0]);
    __syncthreads();
    Work work = work_of<Tile>(args, tickets[0]);
    begin(work);
    for (int parity = 1; work.member != Work::kNone; parity ^= 1) {
      take_ticket(&tickets[parity]);
      work = work.member < 0 ? shrink_tile(work, &tickets[parity]) : main_tile(work, &tickets[parity]);
    }
    ptx::cp_async_wait_all();
    leave();
  }
};

template <class Tile>
LORA_FUSED_DEVICE void matmul(const MatmulLaunch& args) {
  extern __shared__ __align__(128) std::uint8_t stages[];
  Matmul<Tile>(args, ptx::shared_address(stages)).run();
}

}  // namespace lora_fused::sm80
