// Reduce tiles: a gradient of an adapter, out[p, r] = sum_m z[m, p] t[m, r], summed by the launch of dx. They
// wait for memory while the tiles of y wait for the tensor cores.
//
// A tile is 64 columns p of each consumer of a cluster, all ranks (at most 64) and one part of the tokens. A
// stage carries t [128, 64] in place of x and z [128, 64] of each consumer in place of w. The parts are fp32
// partial sums; of the warps that have the same 16 columns the last to arrive adds them up in order.
#pragma once

#include "../fragments.cuh"
#include "scheduler.cuh"

namespace lora_fused::sm90 {

// What a block does in a reduce tile.
struct GradientTile {
  int which;       // of the launch's gradients
  int column;      // the first of this block's 128
  int begin, end;  // blocks of 128 tokens
};

LORA_FUSED_DEVICE GradientTile gradient_tile(const MatmulArgs& args, Tile tile, int rank, int blocks) {
  const int column = tile.column - args.column_tiles, second = args.reduction[1].tiles;
  const int begin = tile.row * args.reduce_steps, all = (args.rows + 127) / 128;
  return {column < second ? 1 : 0, ((column < second ? column : column - second) * blocks + rank) * 128,
          begin, min(begin + args.reduce_steps, all)};
}

// z [64, 64] of a stage, of 16 tokens a step, as the A fragments of this warp's 16 columns. Rows of 128
// bytes, swizzled.
LORA_FUSED_DEVICE void load_across(std::uint32_t (&z)[8][4], std::uint32_t tile, int warp) {
  const int lane = threadIdx.x % 32, token = lane % 8 + lane / 16 * 8, chunk = warp % 4 * 2 + lane / 8 % 2;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    ptx::ldmatrix_x4_trans(z[i], tile + (i * 16 + token) * kSwizzleRow + ((chunk ^ (token % 8)) << 4));
  }
}

// This warp's 16 columns of a part are in d: store them, and where all parts are there, their sum.
LORA_FUSED_DEVICE void add_part(const MatmulArgs& args, const Reduction& to, int part, int column,
                                const float (&d)[32]) {
  if (column >= to.columns) return;
  const int lane = threadIdx.x % 32, eights = (args.reduce_rank + 7) / 8, word = to.first_word + column / 16;
  const int step = 32 * eights;
  float4* parts = reinterpret_cast<float4*>(args.partials) + i64(word) * args.reduce_parts * step + lane;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j < eights) {
      parts[part * step + 32 * j] = make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
    }
  }
  __syncwarp();
  std::uint32_t before = 0;
  const std::uint32_t last = args.reduce_parts - 1;
  if (lane == 0) before = ptx::atom_inc_acq_rel(args.words + args.counters + word, last);
  before = __shfl_sync(0xffffffffu, before, 0);
  __syncwarp();  // what lane 0 acquired is known to all lanes
  if (before != last) return;
#pragma unroll 1
  for (int j = 0; j < eights; ++j) {
    float sum[4] = {};
    for (int p = 0; p < args.reduce_parts; ++p) {
      const float4 v = __ldcg(parts + p * step + 32 * j);
      sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
    cuda::store_fragment(to.out, sum, column, 8 * j, to.columns, args.reduce_rank);
  }
}

}  // namespace lora_fused::sm90
