// The kernels of matmul.cuh: forward, dx and dx with dropout, bf16 and fp16, tiles of 256 and of 128 columns.
#include "matmul.cuh"

#define LORA_KERNEL(T, DIRECTION, BLOCK_N)                                                               \
  extern "C" __global__ void __launch_bounds__(384, 1) lora_matmul_sm90_##T##_##DIRECTION##_n##BLOCK_N(  \
      const __grid_constant__ lora_fused::cuda::Sm90MatmulArgs args) {                                   \
    lora_fused::sm90::matmul<                                                                            \
        lora_fused::sm90::Tiling<lora_fused::T, BLOCK_N, lora_fused::sm90::Direction::DIRECTION>>(args); \
  }

LORA_KERNEL(bf16, forward, 256)
LORA_KERNEL(bf16, forward, 128)
LORA_KERNEL(bf16, dx, 256)
LORA_KERNEL(bf16, dx, 128)
LORA_KERNEL(bf16, dx_masked, 256)
LORA_KERNEL(bf16, dx_masked, 128)
LORA_KERNEL(fp16, forward, 256)
LORA_KERNEL(fp16, forward, 128)
LORA_KERNEL(fp16, dx, 256)
LORA_KERNEL(fp16, dx, 128)
LORA_KERNEL(fp16, dx_masked, 256)
LORA_KERNEL(fp16, dx_masked, 128)
