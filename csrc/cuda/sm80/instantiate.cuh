// The kernels of variants.h.
#pragma once

#include "matmul.cuh"
#include "variants.h"

#define LORA_FUSED_SM80_KERNEL(MATH, T, BM, BN, BK, WM, WN, STAGES, BLOCKS, LAYOUT)      \
  extern "C" __global__ void __launch_bounds__(32 * WM * WN, BLOCKS)                     \
      lora_matmul_sm80_##MATH##_##BM##x##BN##x##BK##_##LAYOUT(                           \
          const __grid_constant__ lora_fused::sm80::MatmulArgs args) {                   \
    using namespace lora_fused;                                                          \
    sm80::matmul<sm80::Tile<T, BM, BN, BK, WM, WN, STAGES, sm80::Layout::LAYOUT>>(args); \
  }
