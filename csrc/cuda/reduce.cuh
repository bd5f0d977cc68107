// out[p,r] = sum_m keep(m,p) z[m,p] t[m,r]       z [M,P], t [M,R]
//
// Both gradients of the adapters in one launch: da [R,K] with z = x (masked), t = ds, and db [N,R] with z =
// dy, t = s. mma.sync on sm_80 and later. One block owns 128 columns of z x kBlockR ranks x one part of the
// tokens, so that z is read once per kBlockR ranks. Parts are fp32 partials; the last block to arrive sums
// them in order (deterministic). blockIdx.x = ((column tile, first gradient's before the second's) * rank
// tiles + rank tile) * splits + part.
//
// Layouts: any strides and addresses; rows in 16-byte pieces take cp.async, others are read element by
// element. The output has its own strides and dtype. Not handled: R = 0; M = 0 writes zeros.
#pragma once

#include "fragments.cuh"

namespace lora_fused::cuda::reduce_kernel {

constexpr int kThreads = 256, kBlockP = 128, kBlockM = 32;

template <typename T, int kBlockR>
struct Tiles {
  static constexpr int kStages = kIsFp32<T> ? 3 : 4;
  using Z = TileCopy<T, kBlockM, kBlockP, kThreads, Read::across>;
  using Ranks = TileCopy<T, kBlockM, kBlockR, kThreads, Read::across>;
  static constexpr int kStageBytes = Z::kBytes + Ranks::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // Two blocks per multiprocessor where 128 registers are enough.
  static constexpr int kMinBlocks = kBlockR > 64 || (kIsFp32<T> && kBlockR > 16) ? 1 : 2;
};

template <typename T, int kBlockR>
LORA_FUSED_DEVICE void run(const ReduceLaunch& p) {
  using Tile = Tiles<T, kBlockR>;
  constexpr int kStages = Tile::kStages, kMmaK = Numeric<Storage<T>>::kMmaK;
  extern __shared__ __align__(128) unsigned char shared[];
  const u32 base = ptx::shared_address(shared);
  ptx::griddepcontrol_wait();

  // Find this block's tile
  const i64 rank_tiles = (p.R + kBlockR - 1) / kBlockR, tile = blockIdx.x / p.splits;
  const int part = static_cast<int>(blockIdx.x % p.splits);
  const i64 first_tiles = (p.gradients[0].P + kBlockP - 1) / kBlockP;
  const bool second = tile / rank_tiles >= first_tiles;
  const Gradient& g = p.gradients[second];
  const i64 column0 = (tile / rank_tiles - (second ? first_tiles : 0)) * kBlockP;
  const i64 rank0 = tile % rank_tiles * kBlockR;
  const i64 steps = (p.M + kBlockM - 1) / kBlockM;
  const i64 begin = steps * part / p.splits, end = steps * (part + 1) / p.splits;

  // Fill the pipeline
  const Mask everything;
  const typename Tile::Z z_copy(g.z, p.M, g.P, g.mask);
  const typename Tile::Ranks t_copy(g.t, p.M, p.R, everything);
  const auto stage_of = [&](i64 step) {
    return base + static_cast<u32>((step - begin) % kStages) * Tile::kStageBytes;
  };
  const auto start = [&](i64 step) {
    if (step < end) {
      z_copy.start(stage_of(step), step * kBlockM, column0);
      t_copy.start(stage_of(step) + Tile::Z::kBytes, step * kBlockM, rank0);
    }
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) start(begin + i);

  // Multiply: one warp has 16 columns of z
  const int warp_column = threadIdx.x / 32 * 16;
  float c[kBlockR / 8][4] = {};
  for (i64 step = begin; step < end; ++step) {
    const u32 z_tile = stage_of(step), t_tile = z_tile + Tile::Z::kBytes;
    ptx::cp_async_wait<kStages - 2>();
    z_copy.finish(z_tile, step * kBlockM, column0);
    __syncthreads();
    start(step + kStages - 1);
#pragma unroll
    for (int m = 0; m < kBlockM; m += kMmaK) {
      u32 zs[4], ts[4];
      fragment_a_across<T>(zs, z_tile, kBlockM, m, warp_column);
#pragma unroll
      for (int j = 0; j < kBlockR / 16; ++j) {
        fragment_b_across<T>(ts, t_tile, kBlockM, m, j * 16);
        Operand<T>::mma(c[2 * j], zs, ts[0], ts[1]);
        Operand<T>::mma(c[2 * j + 1], zs, ts[2], ts[3]);
      }
    }
  }
  ptx::cp_async_wait_all();

  // Sum the parts, round, store
  ptx::griddepcontrol_launch_dependents();
  const PartialSums<kBlockR / 8, kThreads> partials(p.workspace, gridDim.x / p.splits, tile);
  if (p.splits > 1 && !partials.sum(c, part, p.splits)) return;
#pragma unroll
  for (int j = 0; j < kBlockR / 8; ++j)
    store_fragment(g.out, c[j], column0 + warp_column, rank0 + j * 8, g.P, p.R);
}

}  // namespace lora_fused::cuda::reduce_kernel
