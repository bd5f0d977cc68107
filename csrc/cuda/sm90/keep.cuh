// The dropout mask in fragments: of 64 columns a lane holds columns 8 j + 2 (lane % 4) + e in rows g and g +
// 8, g = lane / 4. It is kept in 32 bits: bit 4 j + 2 h + e for row g + 8 h, the order of the accumulators.
#pragma once

#include "../../dropout.h"
#include "../arguments.h"
#include "../ptx.cuh"

namespace lora_fused::sm90 {

struct Keep {
  std::uint64_t seed, per_row;
  std::uint32_t threshold;

  explicit LORA_FUSED_DEVICE Keep(const cuda::Mask& mask)
      : seed(mask.seed_pointer ? *mask.seed_pointer : mask.seed),
        per_row(philox::counters_per_row(mask.row_length)),
        threshold(mask.threshold) {}

  // Of the warp's 16 rows from `row`; `column` is a multiple of 64. A quad shares its rows' counters: each of
  // its lanes makes two of the eight for both rows, and the lanes exchange them.
  LORA_FUSED_DEVICE std::uint32_t fragment(int row, int column) const {
    const int quarter = threadIdx.x % 4;
    std::uint32_t made = 0;  // byte 2 h + j % 2
#pragma unroll 1             // NOTE: side by side they cost registers, and the kernel spills
    for (int i = 0; i < 4; ++i) {
      const std::uint64_t line = row + threadIdx.x % 32 / 4 + 8 * (i / 2);
      const std::uint64_t counter = line * per_row + column / 8 + quarter * 2 + i % 2;
      made |= philox::keep_bits(philox::generate(seed, counter), threshold) << (8 * i);
    }
    std::uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t two_columns = __shfl_sync(0xffffffffu, made, i, 4) >> (2 * quarter);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        kept |= (two_columns >> (8 * j) & 3) << (8 * i + 4 * (j % 2) + 2 * (j / 2));
      }
    }
    return kept;
  }
};

// All ones in the halves of register i of the A fragments of 64 columns whose elements are kept: registers of
// a fragment are ordered (row g, row g + 8) for columns below 8, then for the others.
LORA_FUSED_DEVICE std::uint32_t keep_pair(std::uint32_t kept, int i) {
  const std::uint32_t two = kept >> (2 * i);
  return (two & 1 ? 0x0000ffffu : 0u) | (two & 2 ? 0xffff0000u : 0u);
}

}  // namespace lora_fused::sm90
