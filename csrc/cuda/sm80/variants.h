// Every instantiation of sm80/matmul, stated once: X(math, element, BLOCK_M, BLOCK_N, BLOCK_K, warps along M,
// along N, stages, resident blocks per SM that registers allow for, layout). The kernel's name is
//
//   lora_matmul_sm80_<math>_<BLOCK_M>x<BLOCK_N>x<BLOCK_K>_<layout>
//
// Shared memory: 96 KB for 128 x 256 x 32 and 128 x 128 x 64 (99 KB parts: sm_86, 89, 120), 144 KB for 128 x
// 256 x 64 (sm_80), at most 48 KB for the others, so that two blocks share an SM everywhere. A k block is 64
// or 128 bytes of a row. 128 x 128 x 64 has the finest rounds of tiles among those that keep the tensor cores
// busy with one block.
#pragma once

#define LORA_FUSED_SM80_VARIANTS_16BIT(X, MATH, T) \
  X(MATH, T, 128, 256, 32, 2, 4, 4, 1, k_major)    \
  X(MATH, T, 128, 256, 32, 2, 4, 4, 1, mn_major)   \
  X(MATH, T, 128, 128, 64, 2, 4, 3, 1, k_major)    \
  X(MATH, T, 128, 128, 64, 2, 4, 3, 1, mn_major)   \
  X(MATH, T, 128, 128, 32, 2, 2, 3, 2, k_major)    \
  X(MATH, T, 128, 128, 32, 2, 2, 3, 2, mn_major)   \
  X(MATH, T, 64, 128, 32, 2, 2, 4, 2, k_major)     \
  X(MATH, T, 64, 128, 32, 2, 2, 4, 2, mn_major)    \
  X(MATH, T, 32, 64, 64, 2, 2, 4, 3, k_major)      \
  X(MATH, T, 32, 64, 64, 2, 2, 4, 3, mn_major)     \
  X(MATH, T, 64, 128, 32, 2, 2, 2, 2, any)

#define LORA_FUSED_SM80_VARIANTS_BF16(X, MATH, T) \
  LORA_FUSED_SM80_VARIANTS_16BIT(X, MATH, T)      \
  X(MATH, T, 128, 256, 64, 2, 4, 3, 1, k_major)   \
  X(MATH, T, 128, 256, 64, 2, 4, 3, 1, mn_major)

#define LORA_FUSED_SM80_VARIANTS_32BIT(X, MATH, T) \
  X(MATH, T, 128, 128, 16, 2, 4, 4, 1, k_major)    \
  X(MATH, T, 128, 128, 16, 2, 4, 4, 1, mn_major)   \
  X(MATH, T, 32, 64, 32, 2, 2, 4, 3, k_major)      \
  X(MATH, T, 32, 64, 32, 2, 2, 4, 3, mn_major)     \
  X(MATH, T, 64, 128, 16, 2, 2, 2, 2, any)
