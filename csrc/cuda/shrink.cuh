// s[m,r] = scale * sum_k keep(m,k) x[m,k] a[r,k]      x [M,K], a [R,K], s [M,R]; also ds from dy and lora_B
//
// mma.sync on sm_80 and later. One block owns 128 rows of s x kBlockR columns x one part of K; every x
// element is read once per kBlockR ranks. With splits > 1 the parts are fp32 partials and the last block to
// arrive sums them in order (deterministic). blockIdx.x = ((row tile) * rank tiles + rank tile) * splits +
// part.
//
// Layouts: x along or across its rows, any strides and addresses; rows in 16-byte pieces take cp.async,
// others are read element by element. kAcross = false: the adapter's unit stride is along K (lora_A as
// stored); true: along R (lora_B as stored, for ds). Not handled: M = 0 and R = 0 (nothing to launch).
#pragma once

#include "fragments.cuh"

namespace lora_fused::cuda::shrink_kernel {

constexpr int kThreads = 256, kBlockM = 128, kStages = 3;

template <typename T, int kBlockR, bool kAcross>
struct Tiles {
  static constexpr int kBlockK = kPanelColumns<T>;
  using X = TileCopy<T, kBlockM, kBlockK, kThreads, Read::along>;
  using Along = TileCopy<T, kBlockR, kBlockK, kThreads, Read::along>;
  using Across = TileCopy<T, kBlockK, kBlockR, kThreads, Read::across>;
  using A = std::conditional_t<kAcross, Across, Along>;
  static constexpr int kStageBytes = X::kBytes + A::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // Two blocks per multiprocessor where 128 registers are enough.
  static constexpr int kMinBlocks = kBlockR > 64 || (kIsFp32<T> && kBlockR > 16) ? 1 : 2;
};

template <typename T, int kBlockR, bool kAcross>
LORA_FUSED_DEVICE void run(const ShrinkLaunch& p) {
  using Tile = Tiles<T, kBlockR, kAcross>;
  constexpr int kBlockK = Tile::kBlockK, kSteps = kBlockK / Numeric<Storage<T>>::kMmaK;
  extern __shared__ __align__(128) unsigned char shared[];
  const u32 base = ptx::shared_address(shared);
  ptx::griddepcontrol_wait();

  // Find this block's tile
  const i64 rank_tiles = (p.R + kBlockR - 1) / kBlockR, tile = blockIdx.x / p.splits;
  const int part = static_cast<int>(blockIdx.x % p.splits);
  const i64 row0 = tile / rank_tiles * kBlockM, rank0 = tile % rank_tiles * kBlockR;
  const i64 steps = (p.K + kBlockK - 1) / kBlockK;
  const i64 begin = steps * part / p.splits, end = steps * (part + 1) / p.splits;

  // Fill the pipeline
  const Mask everything;
  const lora_fused::Matrix a = kAcross ? lora_fused::Matrix{p.a.data, p.a.col_stride, p.a.row_stride} : p.a;
  const typename Tile::X x_copy(p.x, p.M, p.K, p.mask);
  const typename Tile::A a_copy(a, kAcross ? p.K : p.R, kAcross ? p.R : p.K, everything);
  const auto stage_of = [&](i64 step) {
    return base + static_cast<u32>((step - begin) % kStages) * Tile::kStageBytes;
  };
  const auto start = [&](i64 step) {
    if (step < end) {
      const u32 x_tile = stage_of(step), a_tile = x_tile + Tile::X::kBytes;
      x_copy.start(x_tile, row0, step * kBlockK);
      a_copy.start(a_tile, kAcross ? step * kBlockK : rank0, kAcross ? rank0 : step * kBlockK);
    }
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) start(begin + i);

  // Multiply: one warp has 16 rows
  const int warp_row = threadIdx.x / 32 * 16;
  float c[kBlockR / 8][4] = {};
  for (i64 step = begin; step < end; ++step) {
    const u32 x_tile = stage_of(step), a_tile = x_tile + Tile::X::kBytes;
    ptx::cp_async_wait<kStages - 2>();
    x_copy.finish(x_tile, row0, step * kBlockK);
    __syncthreads();
    start(step + kStages - 1);
    // NOTE: unrolled, the parts of the six products of fp32 do not fit into the registers.
#pragma unroll(std::is_same_v<T, Ieee> ? 1 : kSteps)
    for (int k = 0; k < kSteps; ++k) {
      const int k0 = k * Numeric<Storage<T>>::kMmaK;
      u32 xs[4], as[4];
      fragment_a_along<T>(xs, x_tile, kBlockM, warp_row, k0);
#pragma unroll
      for (int j = 0; j < kBlockR / 16; ++j) {
        if constexpr (kAcross)
          fragment_b_across<T>(as, a_tile, kBlockK, k0, j * 16);
        else
          fragment_b_along<T>(as, a_tile, kBlockR, j * 16, k0);
        Operand<T>::mma(c[2 * j], xs, as[0], as[1]);
        Operand<T>::mma(c[2 * j + 1], xs, as[2], as[3]);
      }
    }
  }
  ptx::cp_async_wait_all();

  // Sum the parts, scale, round, store
  ptx::griddepcontrol_launch_dependents();
  const PartialSums<kBlockR / 8, kThreads> partials(p.workspace, gridDim.x / p.splits, tile);
  if (p.splits > 1 && !partials.sum(c, part, p.splits)) return;
#pragma unroll
  for (int j = 0; j < kBlockR / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) c[j][e] *= p.scale;
    store_fragment(p.s, c[j], row0 + warp_row, rank0 + j * 8, p.M, p.R);
  }
}

}  // namespace lora_fused::cuda::shrink_kernel
