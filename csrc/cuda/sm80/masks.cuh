// Dropout on fragments. A Philox call gives the bits of 8 columns of a row; the four lanes of a quad share
// them: each makes one call and the others fetch its bits.
#pragma once

#include "../../dropout.h"
#include "../../problem.h"
#include "../ptx.cuh"

namespace lora_fused::sm80 {

constexpr unsigned kFullWarp = 0xffffffffu;

struct Mask {
  u64 seed, counters_per_row;
  u32 threshold;

  // Bit e is set iff element (row, col + e) is kept; col % 8 == 0.
  LORA_FUSED_DEVICE u32 bits(i64 row, int col) const {
    return philox::keep_bits(philox::generate(seed, row * counters_per_row + col / 8), threshold);
  }
};

// a [16, 16 or 8] of x from (row, col), as mma's left fragment: dropped elements become zero.
template <int kSize>
LORA_FUSED_DEVICE void mask_left(std::uint32_t (&a)[4], const Mask& mask, int row, int col, int lane) {
  const int quad = lane & ~3, t = lane & 3;
  const u32 mine = mask.bits(row + (lane >> 2) + 8 * (t & 1), col + (kSize == 2 ? 8 * (t >> 1) : 0));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kSize == 2) {  // a[i]: two columns of row half i % 2, column half i / 2
      const u32 bits = __shfl_sync(kFullWarp, mine, quad + i) >> (2 * t);
      a[i] &= (bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u);
    } else {  // a[i]: column t + 4 (i / 2) of row half i % 2
      const u32 bits = __shfl_sync(kFullWarp, mine, quad + (i & 1)) >> (t + 4 * (i >> 1));
      if (!(bits & 1)) a[i] = 0;
    }
  }
}

// Accumulators [16 kFragsM, 8 kFragsN] of y from (row, col): dropped elements become zero.
template <int kFragsM, int kFragsN>
LORA_FUSED_DEVICE void mask_accumulators(float (&c)[kFragsM][kFragsN][4], const Mask& mask, int row, int col,
                                         int lane) {
  const int quad = lane & ~3, t = lane & 3;
#pragma unroll
  for (int i = 0; i < kFragsM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kFragsN; j += 4) {
        const u32 mine = mask.bits(row + i * 16 + (lane >> 2) + 8 * half, col + (j + t) * 8);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const u32 bits = __shfl_sync(kFullWarp, mine, quad + n) >> (2 * t);
          if (!(bits & 1)) c[i][j + n][2 * half] = 0.f;
          if (!(bits & 2)) c[i][j + n][2 * half + 1] = 0.f;
        }
      }
}

}  // namespace lora_fused::sm80
