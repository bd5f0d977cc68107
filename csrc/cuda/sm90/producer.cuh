// The producer: one thread of each block keeps the ring of stages full by tensor copies.
//
//   S tile      per block of the contraction: x [128, 64] and 1, 2 or 4 blocks of the shrink adapter a
//   main tile   per block of the contraction: x [128, 64] and w [BLOCK_N, 64];
//               then, per 64 ranks: s [128, 64] and b [BLOCK_N, 64]
//   reduce tile per 128 tokens: t [128, 64] and z [128, 64] of either consumer
//
// The blocks of a cluster compute the same columns: each loads its share of w and b for all of them. Copies
// fill with zeros what lies outside a matrix, and count it in the bytes that the stage waits for.
#pragma once

#include "../flags.cuh"
#include "gradient.cuh"

namespace lora_fused::sm90 {

template <class G>
struct Producer {
  const MatmulArgs& args;
  const Shared<G>& shared;
  const std::uint32_t rank = ptx::cluster_rank(), blocks = ptx::cluster_size();
  Ring<G::kStages> stage{};

  LORA_FUSED_DEVICE void run() {
    Ring<G::kStages> slot;
    const std::uint32_t clusters = gridDim.x / blocks;
    Share share{};
    if (rank == 0) share.next(args, clusters);
    while (true) {
      wait_barrier(shared.empty(stage.index), stage.parity ^ 1);
      if (rank == 0) {
        const Tile next = tile_of<G>(args, share.place);
        announce(shared, slot.index, next);
        if (next.row >= 0) share.next(args, clusters);
      }
      wait_barrier(shared.announced(slot.index), slot.parity);
      const Tile tile = announced_tile(shared, slot.index);
      slot.next();
      if (tile.row < 0) break;
      if (tile.column < 0) {
        load_shrink_tile(tile);
      } else if (G::kReduces && tile.column >= args.column_tiles) {
        load_reduce_tile(tile);
      } else {
        load_main_tile(tile);
      }
    }
    ptx::mbarrier_arrive(shared.full(stage.index));
  }

 private:
  LORA_FUSED_DEVICE int first_row(Tile tile) const { return (tile.row * blocks + rank) * G::BLOCK_M; }

  // Wait until the stage is free in the whole cluster; its bytes are on their way then.
  LORA_FUSED_DEVICE void begin_stage(int bytes) {
    wait_barrier(shared.empty(stage.index), stage.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(shared.full(stage.index), bytes);
  }

  LORA_FUSED_DEVICE void load_shrink_tile(Tile tile) {
    const int number = -1 - tile.column, member = number / args.shrink_passes;
    const int rank0 = number % args.shrink_passes * args.shrink_blocks * 64;
    const CUtensorMap* x = &args.x[G::kForward ? 0 : member];
    for (int k = 0; k < args.member[member].depth_blocks; ++k, stage.next()) {
      begin_stage(G::kXBytes + args.shrink_blocks * kOperandBlock);
      const std::uint32_t full = shared.full(stage.index);
      ptx::tensor_load(shared.x(stage.index), x, full, k * 64, first_row(tile));
      for (int i = 0; i < args.shrink_blocks; ++i) {
        const int along = k * 64, across = rank0 + i * 64;
        ptx::tensor_load(shared.w(stage.index) + i * kOperandBlock, &args.a[member], full,
                         G::kMnMajor ? across : along, G::kMnMajor ? along : across);
      }
    }
  }

  LORA_FUSED_DEVICE void load_main_tile(Tile tile) {
    const int owner = G::kForward ? member_of(args, tile.column) : 0;
    const int first = G::kForward ? owner : 0, last = G::kForward ? owner + 1 : args.members;
    const int column = (tile.column - (G::kForward ? args.member[owner].first_tile : 0)) * G::BLOCK_N;
    for (int i = first; i < last; ++i) {
      for (int k = 0; k < args.member[i].depth_blocks; ++k) {
        load_stage(&args.x[G::kForward ? 0 : i], &args.w[i], k * 64, first_row(tile), column);
      }
    }
    if (args.shrink_members > 0) wait_for_s(tile.row * blocks + rank);
    for (int i = first; i < last; ++i) {
      for (int r = 0; r < args.member[i].rank; r += 64) {
        load_stage(&args.s[i], &args.b[i], r, first_row(tile), column);
      }
    }
  }

  LORA_FUSED_DEVICE void load_reduce_tile(Tile tile) {
    static_assert(!G::kReduces || 2 * G::kXBytes == G::kWBytes, "two boxes of z take the place of w");
    const GradientTile job = gradient_tile(args, tile, rank, blocks);
    for (int block = job.begin; block < job.end; ++block, stage.next()) {
      if (job.which == 0 && args.shrink_members > 0) wait_for_s(block);
      begin_stage(G::kStageBytes);
      const std::uint32_t full = shared.full(stage.index), to = shared.w(stage.index);
      ptx::tensor_load(shared.x(stage.index), &args.t[job.which], full, 0, block * 128);
      ptx::tensor_load(to, &args.z[job.which], full, job.column, block * 128);
      ptx::tensor_load(to + G::kXBytes, &args.z[job.which], full, job.column + 64, block * 128);
    }
  }

  // Both warpgroups of every S tile of these 128 rows have posted.
  LORA_FUSED_DEVICE void wait_for_s(int block) const {
    const std::uint32_t* flag = args.words + kFlags + block;
    wait_flag(flag, G::kConsumers * args.shrink_members * args.shrink_passes, args.error);
    ptx::fence_proxy_async_global();
  }

  // x [128, 64] at (row, k) and w [BLOCK_N, 64] at (column, k).
  LORA_FUSED_DEVICE void load_stage(const CUtensorMap* x, const CUtensorMap* w, int k, int row, int column) {
    begin_stage(G::kStageBytes);
    const std::uint32_t full = shared.full(stage.index), to = shared.w(stage.index);
    ptx::tensor_load(shared.x(stage.index), x, full, k, row);
    for (int i = rank; i < G::BLOCK_N / 64; i += blocks) {
      const int across = column + i * 64;
      const int inner = G::kMnMajor ? across : k, outer = G::kMnMajor ? k : across;
      if (blocks == 1) {
        ptx::tensor_load(to + i * kOperandBlock, w, full, inner, outer);
      } else {
        ptx::tensor_load_multicast(to + i * kOperandBlock, w, full, inner, outer, (1 << blocks) - 1);
      }
    }
    stage.next();
  }
};

}  // namespace lora_fused::sm90
