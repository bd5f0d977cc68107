#include "decode.cuh"
#include "launchers.h"

namespace lora_fused::cuda {

// X(element type, its name), by Math
#define LORA_FUSED_DECODE_KERNELS(X) X(Ieee, ieee) X(bf16, bf16) X(fp16, f16) X(Tf32, tf32)

#define LORA_FUSED_DEFINE(T, dtype)                                        \
  extern "C" __global__ void __launch_bounds__(decode_kernel::kThreads, 2) \
      lora_decode_sm80_##dtype(const __grid_constant__ DecodeLaunch p) {   \
    decode_kernel::run<T>(p);                                              \
  }
LORA_FUSED_DECODE_KERNELS(LORA_FUSED_DEFINE)

namespace {

#define LORA_FUSED_ENTRY(T, dtype) \
  {"lora_decode_sm80_" #dtype, reinterpret_cast<const void*>(lora_decode_sm80_##dtype)},
const Kernel kKernels[kMaths] = {LORA_FUSED_DECODE_KERNELS(LORA_FUSED_ENTRY)};

i64 tiles_of(const DecodeLaunch& p) { return tiles(p.N, decode_kernel::kBlockN); }
i64 items_of(const DecodeLaunch& p) { return tiles(p.R, decode_kernel::kRankChunk) * p.s_splits; }

void check_decode(Math math, const DecodeLaunch& p) {
  check_dtype("dtype of y", p.y, math), check_dtype("dtype of s", p.s, math);
  if (p.M > decode_kernel::kTokens) refuse("M", p.M, "at most 16 for decode");
  if (p.R > decode_kernel::kMaxRank) refuse("R", p.R, "at most 512 for decode");
  if (p.splits < 1) refuse("splits", p.splits, "at least 1");
  if (p.s_splits < 1) refuse("s_splits", p.s_splits, "at least 1");
}

}  // namespace

WorkspaceSize workspace_of(Math, const DecodeLaunch& p) {
  const i64 parts = p.splits > 1 ? tiles_of(p) * p.splits * decode_kernel::kTileFloats : 0;
  return {items_of(p) * decode_kernel::kTokens * decode_kernel::kRankChunk + parts,
          decode_kernel::kFirstTicket + tiles_of(p)};
}

void launch_decode(Math math, const DecodeLaunch& p, cudaStream_t stream, bool dependent) {
  if (p.M == 0 || p.N == 0) return;
  check_decode(math, p);
  const std::size_t shared = decode_kernel::kTokens * sizeof(float) * decode_kernel::s_stride(p.R);
  launch(kKernels[static_cast<int>(math)], dim3(grid_size(tiles_of(p) * p.splits)),
         dim3(decode_kernel::kThreads), 1, shared, stream, p, dependent);
}

}  // namespace lora_fused::cuda
