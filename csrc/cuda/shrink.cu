#include "launchers.h"
#include "shrink.cuh"

namespace lora_fused::cuda {

// X(element type, its name, ranks per block, the adapter's layout, whether its unit stride is across K)
// clang-format off
#define LORA_FUSED_SHRINK_KERNELS(X) \
  X(Ieee, ieee, 16, along, false) \
  X(Ieee, ieee, 16, across, true) \
  X(Ieee, ieee, 64, along, false) \
  X(Ieee, ieee, 64, across, true) \
  X(Tf32, tf32, 16, along, false) \
  X(Tf32, tf32, 16, across, true) \
  X(Tf32, tf32, 64, along, false) \
  X(Tf32, tf32, 64, across, true) \
  X(bf16, bf16, 16, along, false) \
  X(bf16, bf16, 16, across, true) \
  X(bf16, bf16, 64, along, false) \
  X(bf16, bf16, 64, across, true) \
  X(bf16, bf16, 128, along, false) \
  X(bf16, bf16, 128, across, true) \
  X(fp16, f16, 16, along, false) \
  X(fp16, f16, 16, across, true) \
  X(fp16, f16, 64, along, false) \
  X(fp16, f16, 64, across, true) \
  X(fp16, f16, 128, along, false) \
  X(fp16, f16, 128, across, true)
// clang-format on

#define LORA_FUSED_DEFINE(T, dtype, R, layout, across)                                         \
  extern "C" __global__ void __launch_bounds__(shrink_kernel::kThreads,                        \
                                               shrink_kernel::Tiles<T, R, across>::kMinBlocks) \
      lora_shrink_sm80_##dtype##_r##R##_##layout(const __grid_constant__ ShrinkLaunch p) {     \
    shrink_kernel::run<T, R, across>(p);                                                       \
  }
LORA_FUSED_SHRINK_KERNELS(LORA_FUSED_DEFINE)

namespace {

struct Variant {
  Math math;
  int block_r;
  bool across;
  int shared_bytes;
  Kernel kernel;
};

#define LORA_FUSED_ENTRY(T, dtype, R, layout, across) \
  {Math::dtype,                                       \
   R,                                                 \
   across,                                            \
   shrink_kernel::Tiles<T, R, across>::kSharedBytes,  \
   {"lora_shrink_sm80_" #dtype "_r" #R "_" #layout,   \
    reinterpret_cast<const void*>(lora_shrink_sm80_##dtype##_r##R##_##layout)}},
const Variant kVariants[] = {LORA_FUSED_SHRINK_KERNELS(LORA_FUSED_ENTRY)};

const Variant& variant_of(Math math, const ShrinkLaunch& p) {
  const bool across = p.a.row_stride == 1 && p.a.col_stride != 1;
  const int block_r = rank_tile(math, p.R);
  for (const Variant& v : kVariants)
    if (v.math == math && v.block_r == block_r && v.across == across) return v;
  refuse("dtype", static_cast<i64>(math), "one with shrink kernels");
}

i64 tiles_of(Math math, const ShrinkLaunch& p) {
  return tiles(p.M, shrink_kernel::kBlockM) * tiles(p.R, rank_tile(math, p.R));
}

}  // namespace

WorkspaceSize workspace_of(Math math, const ShrinkLaunch& p) {
  if (p.splits <= 1) return {};
  const i64 count = tiles_of(math, p);
  return {count * p.splits * shrink_kernel::kBlockM * rank_tile(math, p.R), count};
}

void launch_shrink(Math math, const ShrinkLaunch& p, cudaStream_t stream, bool dependent) {
  if (p.splits < 1) refuse("splits", p.splits, "at least 1");
  const Variant& v = variant_of(math, p);
  launch(v.kernel, dim3(grid_size(tiles_of(math, p) * p.splits)), dim3(shrink_kernel::kThreads), 1,
         v.shared_bytes, stream, p, dependent);
}

}  // namespace lora_fused::cuda
