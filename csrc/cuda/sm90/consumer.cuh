// The consumers: each of two warpgroups multiplies 64 rows of a tile, with wgmma from shared memory.
//
// At most one group of wgmmas is in flight while the next stage is waited for; the stage before is released
// to every producer of the cluster as soon as its group is done.
#pragma once

#include "epilogue.cuh"
#include "gradient.cuh"
#include "keep.cuh"

namespace lora_fused::sm90 {

// NOTE: the compiler must see that all lanes take the same branches, else it serialises every wgmma.
LORA_FUSED_DEVICE int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }
LORA_FUSED_DEVICE Tile uniform(Tile tile) { return {uniform(tile.row), uniform(tile.column)}; }

template <class G>
struct Consumer {
  using T = typename G::T;

  const MatmulArgs& args;
  const Shared<G>& shared;
  const int thread = threadIdx.x % 128, warp = threadIdx.x / 32;
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const std::uint32_t rank = ptx::cluster_rank(), blocks = ptx::cluster_size();
  Ring<G::kStages> stage{};

  LORA_FUSED_DEVICE void run() {
    Ring<G::kStages> slot;
    while (true) {
      wait_barrier(shared.full(stage.index), stage.parity);
      const Tile tile = uniform(announced_tile(shared, slot.index));
      slot.next();
      ptx::bar_sync(1 + group, 128);  // all warps have read the slot: what one releases may free it
      if (tile.row < 0) break;
      if (tile.column < 0) {
        shrink_tile(tile);
      } else if (G::kReduces && tile.column >= args.column_tiles) {
        reduce_tile(tile);
      } else {
        main_tile(tile);
      }
    }
    finish_stores();
  }

 private:
  LORA_FUSED_DEVICE std::uint32_t x_rows() const { return shared.x(stage.index) + group * kOperandBlock; }

  // The first of this warp's 16 rows.
  LORA_FUSED_DEVICE int first_row(Tile tile) const {
    return (tile.row * int(blocks) + int(rank)) * G::BLOCK_M + warp * 16;
  }

  // The warpgroup no longer reads a stage: one arrival at each producer that writes to it.
  LORA_FUSED_DEVICE void release(int used) const {
    if (thread < blocks) ptx::mbarrier_arrive_cluster(ptx::map_to_rank(shared.empty(used), thread));
  }

  // d[64, kN] (+)= x[64, 16 kSteps] w[kN, 16 kSteps]^T, of w from byte `offset`; one group of wgmmas.
  template <int kN, int kSteps>
  LORA_FUSED_DEVICE void multiply(float (&d)[kN / 2], bool add, int offset = 0) const {
    const std::uint32_t w = shared.w(stage.index) + offset;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      Wgmma<T, kN>::template ss<G::kMnMajor>(
          d, operand_descriptor<false>(x_rows() + operand_step<false>(k)),
          operand_descriptor<G::kMnMajor>(w + operand_step<G::kMnMajor>(k)), add || k > 0);
    }
    ptx::wgmma_commit();
  }

  // The same for the last ranks, `steps` of 16, 1 to 4; waits for the result.
  template <int kN>
  LORA_FUSED_DEVICE void multiply_ranks(float (&d)[kN / 2], int steps, bool add, int offset = 0) const {
    switch (uniform(steps)) {
      case 1:
        multiply<kN, 1>(d, add, offset);
        ptx::wgmma_wait<0>();
        break;
      case 2:
        multiply<kN, 2>(d, add, offset);
        ptx::wgmma_wait<0>();
        break;
      case 3:
        multiply<kN, 3>(d, add, offset);
        ptx::wgmma_wait<0>();
        break;
      default:
        multiply<kN, 4>(d, add, offset);
        ptx::wgmma_wait<0>();
    }
  }

  // ---- tiles --------------------------------------------------------------------------------------------

  LORA_FUSED_DEVICE void main_tile(Tile tile) {
    const int owner = G::kForward ? member_of(args, tile.column) : 0;
    const int first = G::kForward ? owner : 0, last = G::kForward ? owner + 1 : args.members;
    int depth = 0;
    for (int i = first; i < last; ++i) depth += args.member[i].depth_blocks;
    float accum[G::kAccumulators];
    contract<G::BLOCK_N>(accum, uniform(depth));
    for (int i = first; i < last; ++i) {
      if constexpr (G::kMasked) {
        add_masked_ranks(accum, args.member[i], tile);
      } else {
        add_ranks(accum, args.member[i]);
      }
    }
    const Member& member = args.member[owner];
    const Destination to{&args.y[owner], member.bias, 1.f, int(args.rows), member.columns};
    const int column = (tile.column - (G::kForward ? member.first_tile : 0)) * G::BLOCK_N;
    store_rows<G>(accum, to, first_row(tile), column, shared.staging(warp));
  }

  // s = scale (keep * x) a^T, of 64 or BLOCK_N columns, for other blocks to read.
  LORA_FUSED_DEVICE void shrink_tile(Tile tile) {
    const int number = -1 - tile.column, index = number / args.shrink_passes;
    const int column = number % args.shrink_passes * args.shrink_blocks * 64;
    const Member& member = args.member[index];
    const Destination to{&args.s_out[index], nullptr, member.scale, int(args.rows), int(member.shrink_rank)};
    if (uniform(args.shrink_blocks) > 1) {
      float accum[G::kAccumulators];
      contract<G::BLOCK_N>(accum, uniform(member.depth_blocks));
      store_rows<G>(accum, to, first_row(tile), column, shared.staging(warp));
    } else {
      float accum[32];
      if (G::kForward && uniform(member.mask.threshold) != 0) {
        contract_masked(accum, member, first_row(tile));
      } else {
        contract<64>(accum, uniform(member.depth_blocks));
      }
      store_rows<G>(accum, to, first_row(tile), column, shared.staging(warp));
    }
    post_s(tile);
  }

  // One part of 64 columns of a gradient of this warpgroup.
  LORA_FUSED_DEVICE void reduce_tile(Tile tile) {
    const GradientTile job = gradient_tile(args, tile, rank, blocks);
    float accum[32];
    contract_tokens(accum, uniform(job.end - job.begin));
    const int column = job.column + group * 64 + warp % 4 * 16;
    add_part(args, args.reduction[uniform(job.which)], tile.row, column, accum);
  }

  // This warpgroup's 64 rows of s are in global memory.
  LORA_FUSED_DEVICE void post_s(Tile tile) const {
    finish_stores();
    ptx::fence_proxy_async_global();
    ptx::bar_sync(1 + group, 128);
    if (thread == 0) ptx::red_add_release(args.words + kFlags + tile.row * blocks + rank, 1);
  }

  // ---- sums ---------------------------------------------------------------------------------------------

  // d = sum over `depth` stages, 1 or more. NOTE: a loop that may run no times would make ptxas serialise.
  template <int kN>
  LORA_FUSED_DEVICE void contract(float (&d)[kN / 2], int depth) {
    int previous = -1, k = 0;
    do {
      wait_barrier(shared.full(stage.index), stage.parity);
      multiply<kN, 4>(d, k > 0);
      ptx::wgmma_wait<1>();
      if (previous >= 0) release(previous);
      previous = stage.index;
      stage.next();
    } while (++k < depth);
    ptx::wgmma_wait<0>();
    release(previous);
  }

  // accum += s b^T, 64 ranks a stage.
  LORA_FUSED_DEVICE void add_ranks(float (&accum)[G::kAccumulators], const Member& member) {
    for (int r = 0; r < int(member.rank); r += 64, stage.next()) {
      wait_barrier(shared.full(stage.index), stage.parity);
      multiply_ranks<G::BLOCK_N>(accum, steps_of(member, r), true);
      release(stage.index);
    }
  }

  // Steps of 16 ranks in the stage that begins at rank r.
  static LORA_FUSED_DEVICE int steps_of(const Member& member, int r) {
    return (min(int(member.rank) - r, 64) + 15) / 16;
  }

  // accum += keep * (s b^T): 64 columns at a time through registers of their own.
  LORA_FUSED_DEVICE void add_masked_ranks(float (&accum)[G::kAccumulators], const Member& member, Tile tile) {
    const Keep keep(member.mask);
    for (int r = 0; r < int(member.rank); r += 64, stage.next()) {
      wait_barrier(shared.full(stage.index), stage.parity);
#pragma unroll
      for (int c = 0; c < G::BLOCK_N / 64; ++c) {
        const std::uint32_t kept = keep.fragment(first_row(tile), tile.column * G::BLOCK_N + c * 64);
        float part[32];
        multiply_ranks<64>(part, steps_of(member, r), false, c * kOperandBlock);
#pragma unroll
        for (int i = 0; i < 32; ++i) accum[c * 32 + i] += kept >> i & 1 ? part[i] : 0.f;
      }
      release(stage.index);
    }
  }

  // As contract(), with x through registers, where the elements that dropout takes become zero.
  LORA_FUSED_DEVICE void contract_masked(float (&d)[32], const Member& member, int row) {
    const Keep keep(member.mask);
    for (int k = 0; k < uniform(member.depth_blocks); ++k, stage.next()) {
      const std::uint32_t kept = keep.fragment(row, k * 64);
      wait_barrier(shared.full(stage.index), stage.parity);
      std::uint32_t x[4][4];
      load_x(x);
#pragma unroll
      for (int i = 0; i < 16; ++i) x[i / 4][i % 4] &= keep_pair(kept, i);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t a = shared.w(stage.index) + operand_step<G::kMnMajor>(i);
        Wgmma<T, 64>::template rs<G::kMnMajor>(d, x[i], operand_descriptor<G::kMnMajor>(a), k > 0 || i > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::bar_sync(1 + group, 128);  // all warps have read x
      release(stage.index);
    }
  }

  // d = sum over `steps` stages of z^T t, 128 tokens each: z through registers, where it is transposed.
  LORA_FUSED_DEVICE void contract_tokens(float (&d)[32], int steps) {
    int k = 0;
    do {
      wait_barrier(shared.full(stage.index), stage.parity);
      std::uint32_t z[8][4];
      load_across(z, shared.w(stage.index) + group * G::kXBytes, warp);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const std::uint32_t t = shared.x(stage.index) + operand_step<true>(i);
        Wgmma<T, 64>::template rs<true>(d, z[i], operand_descriptor<true>(t), k > 0 || i > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::bar_sync(1 + group, 128);  // all warps have read z
      release(stage.index);
      stage.next();
    } while (++k < steps);
  }

  // x[16, 64] of this warp as the fragments of four steps. Rows of 128 bytes, swizzled.
  LORA_FUSED_DEVICE void load_x(std::uint32_t (&x)[4][4]) const {
    const int row = warp % 4 * 16 + threadIdx.x % 16, half = threadIdx.x % 32 / 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::ldmatrix_x4(x[i], x_rows() + row * kSwizzleRow + (((2 * i + half) ^ (row % 8)) << 4));
    }
  }
};

}  // namespace lora_fused::sm90
