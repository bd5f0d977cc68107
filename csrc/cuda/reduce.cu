#include "launchers.h"
#include "reduce.cuh"

namespace lora_fused::cuda {

// X(element type, its name, ranks per block)
// clang-format off
#define LORA_FUSED_REDUCE_KERNELS(X) \
  X(Ieee, ieee, 16) \
  X(Ieee, ieee, 64) \
  X(Tf32, tf32, 16) \
  X(Tf32, tf32, 64) \
  X(bf16, bf16, 16) \
  X(bf16, bf16, 64) \
  X(bf16, bf16, 128) \
  X(fp16, f16, 16) \
  X(fp16, f16, 64) \
  X(fp16, f16, 128)
// clang-format on

#define LORA_FUSED_DEFINE(T, dtype, R)                                                 \
  extern "C" __global__ void __launch_bounds__(reduce_kernel::kThreads,                \
                                               reduce_kernel::Tiles<T, R>::kMinBlocks) \
      lora_reduce_sm80_##dtype##_r##R(const __grid_constant__ ReduceLaunch p) {        \
    reduce_kernel::run<T, R>(p);                                                       \
  }
LORA_FUSED_REDUCE_KERNELS(LORA_FUSED_DEFINE)

namespace {

struct Variant {
  Math math;
  int block_r;
  int shared_bytes;
  Kernel kernel;
};

#define LORA_FUSED_ENTRY(T, dtype, R)        \
  {Math::dtype,                              \
   R,                                        \
   reduce_kernel::Tiles<T, R>::kSharedBytes, \
   {"lora_reduce_sm80_" #dtype "_r" #R, reinterpret_cast<const void*>(lora_reduce_sm80_##dtype##_r##R)}},
const Variant kVariants[] = {LORA_FUSED_REDUCE_KERNELS(LORA_FUSED_ENTRY)};

const Variant& variant_of(Math math, const ReduceLaunch& p) {
  const int block_r = rank_tile(math, p.R);
  for (const Variant& v : kVariants)
    if (v.math == math && v.block_r == block_r) return v;
  refuse("dtype", static_cast<i64>(math), "one with reduce kernels");
}

i64 tiles_of(Math math, const ReduceLaunch& p) {
  i64 columns = 0;
  for (int i = 0; i < p.count; ++i) columns += tiles(p.gradients[i].P, reduce_kernel::kBlockP);
  return columns * tiles(p.R, rank_tile(math, p.R));
}

}  // namespace

WorkspaceSize workspace_of(Math math, const ReduceLaunch& p) {
  if (p.splits <= 1) return {};
  const i64 count = tiles_of(math, p);
  return {count * p.splits * reduce_kernel::kBlockP * rank_tile(math, p.R), count};
}

void launch_reduce(Math math, const ReduceLaunch& p, cudaStream_t stream, bool dependent) {
  if (p.splits < 1) refuse("splits", p.splits, "at least 1");
  if (p.count < 1 || p.count > 2) refuse("gradients", p.count, "1 or 2");
  const Variant& v = variant_of(math, p);
  launch(v.kernel, dim3(grid_size(tiles_of(math, p) * p.splits)), dim3(reduce_kernel::kThreads), 1,
         v.shared_bytes, stream, p, dependent);
}

}  // namespace lora_fused::cuda
